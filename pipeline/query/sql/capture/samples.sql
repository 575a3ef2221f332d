-- One row per sample: a document, or a window of one.
-- sample_id: document id, '#', number of the window
-- document: the document's id
-- window_number: number of the window in its document, from 0
-- source: the document id up to its last '/'; without one, up to its first '#' or ':'
-- script: the writing system of most of its letters: Latin, Cyrillic, Han, Kana, ... or other
-- text: the text; null in a capture without it
-- bytes: bytes of the text
-- tokens: teacher tokens
-- rows: teacher rows, one per token (but the first where first_row is 1)
-- entries: entries kept in all its rows; null where a subset left rows out
-- nats: -log of the probability that the teacher gives the text
-- bits_per_byte: the same in bits, per byte of the text
-- first_row: 1 where the first token has no row, since the teacher saw nothing before it
-- complete: the sample ends where its document ends
-- snapped: some ends were moved up to a safe byte, since the tokenizer changes the text
SELECT
    sample_id,
    document_of(sample_id) AS document,
    window_of(sample_id) AS window_number,
    source_of(sample_id) AS source,
    script_of(text) AS script,
    text,
    teacher_end[-1] AS bytes,
    len(teacher_ids) AS tokens,
    len(realised_logprob) AS rows,
    CAST(list_sum(kept) AS BIGINT) AS entries,
    -list_sum(realised_logprob) AS nats,
    bits_per_byte_of(nats, bytes) AS bits_per_byte,
    first_row,
    complete,
    snapped
FROM capture._rows
