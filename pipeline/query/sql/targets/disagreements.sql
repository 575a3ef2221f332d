-- Chunks in the order of how little probability the teacher gives their text; least first.
-- sample_id: the sample
-- chunk: the chunk, as in chunks
-- source: of the sample, as in samples
-- bits: -log2 of the probability that the teacher gives the text
-- probability: the same as a probability
-- student_tokens: how many student tokens it has
-- teacher_tokens: how many teacher tokens it has
-- before: up to 60 bytes of text before it
-- text: its text
-- after: up to 60 bytes of text after it
-- start_byte: where it starts in the sample's text
SELECT
    sample_id, chunk, source, bits, pow(2, -bits) AS probability, student_tokens, teacher_tokens,
    -- only what is shown is made readable
    readable(before) AS before, readable(text) AS text, readable(after) AS after, start_byte
FROM (
    SELECT
        sample_id,
        chunk,
        source_of(sample_id) AS source,
        -teacher_logprob / ln(2) AS bits,
        student_end - student_start AS student_tokens,
        teacher_end - teacher_start AS teacher_tokens,
        spelling[greatest(start_byte - 59, 1):start_byte] AS before,
        spelling[start_byte + 1:end_byte] AS text,
        spelling[end_byte + 1:end_byte + 60] AS after,
        start_byte
    FROM targets._chunks
    WHERE teacher_logprob IS NOT NULL
    ORDER BY teacher_logprob, sample_id, chunk
)
