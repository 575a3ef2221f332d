-- One row per chunk: the smallest span that both tokenizations cut at the same bytes.
-- sample_id: the sample
-- chunk: number of the chunk in its sample, from 0
-- source: of the sample, as in samples
-- script: of the sample, as in samples
-- kind: text; eos (closes the document on both sides); lead (tokens 0 bytes wide before the text, no target); of conversations also stop (ends an answer, or opens or closes thinking) and gap (what is not taught on both sides, no target)
-- student_start: its first student token, as in student_tokens
-- student_end: the student token after its last
-- teacher_start: its first teacher token
-- teacher_end: the teacher token after its last
-- student_tokens: how many student tokens it has
-- teacher_tokens: how many teacher tokens it has
-- one_to_one: one token on either side
-- start_byte: where it starts in the sample's text
-- end_byte: where it ends
-- bytes: bytes of text
-- text: its text, as the student's tokens spell it; what is not UTF-8 written like \xe6
-- teacher_logprob: nats; log-probability that the teacher gives its text; null without a row, or where an import does not say
-- bits_per_byte: the same in bits, positive, per byte
-- space_probability: that a token starting with a space comes after it; null without loss alm or a row
SELECT
    sample_id,
    chunk,
    source_of(sample_id) AS source,
    script,
    kind,
    student_start,
    student_end,
    teacher_start,
    teacher_end,
    student_end - student_start AS student_tokens,
    teacher_end - teacher_start AS teacher_tokens,
    student_end - student_start = 1 AND teacher_end - teacher_start = 1 AS one_to_one,
    start_byte,
    end_byte,
    end_byte - start_byte AS bytes,
    readable(spelling[start_byte + 1:end_byte]) AS text,
    teacher_logprob,
    bits_per_byte_of(-teacher_logprob, end_byte - start_byte) AS bits_per_byte,
    exp(space_logprob) AS space_probability
FROM targets._chunks
