-- Chunks in bytes, without what is shown to people; of conversations a chunk without a target is a gap.
SELECT
    * EXCLUDE (of_chat, no_target),
    CASE WHEN of_chat AND no_target THEN 'gap' WHEN end_byte > start_byte THEN 'text'
         WHEN of_chat THEN 'stop' WHEN chunk = 0 THEN 'lead' ELSE 'eos' END AS kind
FROM (
    SELECT
        sample_id,
        spelling,
        script_of(readable(spelling)) AS script,
        learn IS NOT NULL AS of_chat,
        CAST(unnest(range(len(chunk_student_end))) AS INTEGER) AS chunk,
        unnest(starts_of(chunk_student_end)) AS student_start,
        unnest(chunk_student_end) AS student_end,
        unnest(starts_of(chunk_teacher_end)) AS teacher_start,
        unnest(chunk_teacher_end) AS teacher_end,
        unnest(starts_of(chunk_end)) AS start_byte,
        unnest(chunk_end) AS end_byte,
        isnan(unnest(teacher_logprob)) AS no_target,
        finite(unnest(teacher_logprob)) AS teacher_logprob,
        known(unnest(alm_space_logprob)) AS space_logprob
    FROM targets._samples
)
