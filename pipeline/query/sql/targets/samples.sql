-- One row per sample: a document, a window of one, or a conversation.
-- sample_id: as in the capture: document id, '#', number of the window
-- document: the document's id
-- window_number: number of the window in its document, from 0
-- source: the document id up to its last '/'; without one, up to its first '#' or ':'
-- script: the writing system of most of its letters: Latin, Cyrillic, Han, Kana, ... or other
-- text: the text, as the student's tokens spell it
-- bytes: bytes of the text
-- taught_bytes: bytes of what is taught, of the chunks with a target; of plain text all
-- student_tokens: student tokens
-- taught_tokens: those that are taught; of plain text all
-- teacher_tokens: teacher tokens up to the end of the last chunk
-- chunks: chunks, without gaps
-- nats: -log of the probability that the teacher gives the text, of the chunks that have a row; null where an import does not say of each
-- bits_per_byte: the same in bits, per taught byte
-- teacher_entropy: nats; mean over chunk rows, the rest as one cell; null without a row
-- teacher_top1: mean over chunk rows of the largest probability; null without a row
SELECT
    sample_id,
    document_of(sample_id) AS document,
    window_of(sample_id) AS window_number,
    source_of(sample_id) AS source,
    script_of(readable(spelling)) AS script,
    readable(spelling) AS text,
    student_end[-1] AS bytes,
    CASE WHEN learn IS NULL THEN bytes ELSE list_sum(chosen(widths_of(chunk_end), has_row)) END AS taught_bytes,
    len(student_ids) AS student_tokens,
    CASE WHEN learn IS NULL THEN student_tokens ELSE len(list_where(learn, learn)) END AS taught_tokens,
    chunk_teacher_end[-1] AS teacher_tokens,
    CASE WHEN learn IS NULL THEN len(chunk_student_end) ELSE len(list_where(has_row, has_row)) END AS chunks,
    finite(-list_sum(list_where(teacher_logprob, has_row))) AS nats,
    bits_per_byte_of(nats, taught_bytes) AS bits_per_byte,
    known(teacher_entropy) AS teacher_entropy,
    known(teacher_top1) AS teacher_top1
FROM (SELECT *, list_transform(teacher_logprob, lambda one: NOT isnan(one)) AS has_row FROM targets._samples)
