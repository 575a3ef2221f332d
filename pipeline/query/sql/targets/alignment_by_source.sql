-- How the two tokenizations lie to each other, by source and script; most bytes first.
-- source: of the samples, as in samples
-- script: of the samples, as in samples
-- samples: samples
-- chunks: chunks with text, and those of eos or stop
-- one_to_one: share of the chunks with one token on either side
-- student_tokens_per_chunk: mean
-- teacher_tokens_per_chunk: mean
-- bytes_per_student_token: of chunks
-- bytes_per_teacher_token: of chunks
-- bits_per_byte: the teacher's, over chunks with a row
-- bytes: bytes of these chunks
SELECT
    source_of(sample_id) AS source,
    script,
    count(DISTINCT sample_id) AS samples,
    count(*) AS chunks,
    avg(CAST(student_end - student_start = 1 AND teacher_end - teacher_start = 1 AS INTEGER)) AS one_to_one,
    avg(student_end - student_start) AS student_tokens_per_chunk,
    avg(teacher_end - teacher_start) AS teacher_tokens_per_chunk,
    sum(end_byte - start_byte) / nullif(sum(student_end - student_start), 0) AS bytes_per_student_token,
    sum(end_byte - start_byte) / nullif(sum(teacher_end - teacher_start), 0) AS bytes_per_teacher_token,
    bits_per_byte_of(
        -sum(teacher_logprob), sum(end_byte - start_byte) FILTER (WHERE teacher_logprob IS NOT NULL)
    ) AS bits_per_byte,
    CAST(sum(end_byte - start_byte) AS BIGINT) AS bytes
FROM targets._chunks
WHERE kind NOT IN ('lead', 'gap')
GROUP BY ALL
ORDER BY bytes DESC, source, script
