-- Chunks in bytes, without what is shown to people.
SELECT
    sample_id,
    spelling,
    script,
    CAST(unnest(range(len(chunk_student_end))) AS INTEGER) AS chunk,
    unnest(starts_of(chunk_student_end)) AS student_start,
    unnest(chunk_student_end) AS student_end,
    unnest(starts_of(chunk_teacher_end)) AS teacher_start,
    unnest(chunk_teacher_end) AS teacher_end,
    coalesce(unnest(starts_of(byte_ends)), 0) AS start_byte,
    coalesce(unnest(byte_ends), 0) AS end_byte,
    known(unnest(teacher_logprob)) AS teacher_logprob,
    known(unnest(alm_space_logprob)) AS space_logprob
FROM (
    SELECT
        sample_id,
        spelling,
        script_of(readable(spelling)) AS script,
        chunk_student_end,
        chunk_teacher_end,
        -- an end of 0 tokens (only such as are 0 bytes wide before it) is no index: null
        list_select(student_end, CAST(chunk_student_end AS BIGINT[])) AS byte_ends,
        teacher_logprob,
        alm_space_logprob
    FROM targets._samples
)
