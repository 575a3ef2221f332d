-- One row per token of each chunk, student's and teacher's.
-- Needs: capture
-- sample_id: the sample
-- chunk: the chunk, as in chunks
-- side: student or teacher
-- pos: as in student_tokens or teacher_tokens
-- token_id: id on its side
-- bytes: its bytes
-- token: its bytes as text
-- logprob: nats; what the teacher gives its own token there; null for the student's
SELECT sample_id, chunk, 'student' AS side, pos, student_id AS token_id, bytes, token, NULL::FLOAT AS logprob
FROM targets.student_tokens WHERE chunk IS NOT NULL
UNION ALL
SELECT
    sample_id, chunk, 'teacher', pos, teacher_id, teacher_bytes_of(teacher_id), teacher_text_of(teacher_id), logprob
FROM (
    SELECT
        sample_id,
        CAST(unnest(range(len(teacher_ids))) AS INTEGER) AS pos,
        unnest(teacher_ids) AS teacher_id,
        known(unnest(taken(realised_logprob, row))) AS logprob,
        unnest(steps(chunk_teacher_end, CAST(len(teacher_ids) AS INTEGER))) AS chunk
    FROM targets._stored JOIN capture._rows USING (sample_id)
)
WHERE chunk IS NOT NULL
