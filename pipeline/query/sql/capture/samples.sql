-- One row per sample: a document, a window of one, or a conversation.
-- sample_id: document id, '#', number of the window
-- document: the document's id
-- window_number: number of the window in its document, from 0
-- source: the document id up to its last '/'; without one, up to its first '#' or ':'
-- script: the writing system of most of its letters: Latin, Cyrillic, Han, Kana, ... or other
-- text: the text; null in a capture without it
-- bytes: bytes of the text
-- taught_bytes: bytes of what is taught; of plain text all
-- turns: messages of which something is taught; null of plain text
-- tokens: teacher tokens
-- rows: teacher rows, one per taught token (but the first where first_row is 1)
-- entries: entries kept in all its rows; null where a subset left rows out
-- nats: -log of the probability that the teacher gives what is taught; null where an import does not say of each token
-- bits_per_byte: the same in bits, per taught byte
-- first_row: 1 where the first token has no row, since the teacher saw nothing before it
-- complete: the sample ends where its document ends
-- messages: the conversation as JSON, with its tools; null of plain text
-- snapped: some ends were moved up to a safe byte, since the tokenizer changes the text
SELECT
    sample_id,
    document_of(sample_id) AS document,
    window_of(sample_id) AS window_number,
    source_of(sample_id) AS source,
    script_of(text) AS script,
    text,
    teacher_end[-1] AS bytes,
    list_sum(chosen(widths_of(span_byte_end), span_learn)) AS taught_bytes,
    nullif(len(list_distinct(list_where(span_message, span_learn))), 0) AS turns,
    len(teacher_ids) AS tokens,
    len(realised_logprob) AS rows,
    CAST(list_sum(kept) AS BIGINT) AS entries,
    known(-list_sum(realised_logprob)) AS nats,
    bits_per_byte_of(nats, taught_bytes) AS bits_per_byte,
    first_row,
    complete,
    messages,
    snapped
FROM capture._rows
