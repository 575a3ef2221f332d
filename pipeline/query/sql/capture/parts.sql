-- One row per part: a file, as its commit record says.
-- part: its number
-- samples: samples in it
-- tokens: teacher tokens
-- rows: teacher rows
-- entries: entries kept in them
-- text_bytes: bytes of text
-- file_bytes: bytes of the file
-- bytes_per_token: of the file
-- sha256: of the file
-- counts: what else was counted, such as snapped
SELECT
    part, samples, tokens, rows, entries, text_bytes, file_bytes, file_bytes / nullif(tokens, 0) AS bytes_per_token,
    sha256, counts
FROM capture._records
