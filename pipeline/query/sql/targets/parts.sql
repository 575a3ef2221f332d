-- One row per part: a file, as its commit record says.
-- part: its number, that of the capture's part it was made from
-- samples: samples in it
-- tokens: student tokens
-- chunks: chunks
-- text_bytes: bytes of text
-- file_bytes: bytes of the file
-- bytes_per_token: of the file
-- sha256: of the file
-- counts: what else was counted, such as chunks_1_1
SELECT
    part, samples, tokens, entries AS chunks, text_bytes, file_bytes,
    file_bytes / nullif(tokens, 0) AS bytes_per_token, sha256, counts
FROM targets._records
