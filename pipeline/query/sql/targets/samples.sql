-- One row per sample: a document, or a window of one.
-- sample_id: as in the capture: document id, '#', number of the window
-- document: the document's id
-- window_number: number of the window in its document, from 0
-- source: the document id up to its last '/'; without one, up to its first '#' or ':'
-- script: the writing system of most of its letters: Latin, Cyrillic, Han, Kana, ... or other
-- text: the text, as the student's tokens spell it
-- bytes: bytes of the text
-- student_tokens: student tokens
-- teacher_tokens: teacher tokens up to the end of the last chunk
-- chunks: chunks
-- nats: -log of the probability that the teacher gives the text, of the chunks that have a row
-- bits_per_byte: the same in bits, per byte of the text
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
    len(student_ids) AS student_tokens,
    chunk_teacher_end[-1] AS teacher_tokens,
    len(chunk_student_end) AS chunks,
    -list_sum(list_filter(teacher_logprob, lambda logprob: NOT isnan(logprob))) AS nats,
    bits_per_byte_of(nats, bytes) AS bits_per_byte,
    known(teacher_entropy) AS teacher_entropy,
    known(teacher_top1) AS teacher_top1
FROM targets._samples
