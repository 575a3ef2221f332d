-- What holds of targets of conversations beside check.sql. built: of summary_batch, a row per sample. What has a
-- teacher_logprob has a target; of the others, the gaps, nothing is known. untaught: tokens that are not taught, of
-- both sides, most of any chunk with a target; chunk_tokens: of both sides, fewest of any chunk; bytes of the text:
-- taught_bytes of the capture's spans, lost_bytes of them that the student cannot have, chunk_bytes of chunks with a
-- target; in_gaps: entries of targets that stand in gaps.
SELECT
    sample_id,
    unnest([
        CASE WHEN len(learn) <> len(student_ids) THEN 'learn has another length than its tokens' END,
        CASE WHEN untaught > 0 THEN 'a chunk with a target has a token that is not taught' END,
        CASE WHEN chunk_tokens < 1 THEN 'a gap has no tokens' END,
        CASE WHEN coalesce(chunk_student_end[-1], 0) <> len(student_ids)
            OR coalesce(chunk_teacher_end[-1], 0) <> len(teacher_end) THEN 'chunks do not cover all tokens' END,
        CASE WHEN chunk_bytes + lost_bytes <> taught_bytes
            THEN 'taught bytes that both sides have are in no chunk, or in two' END,
        CASE WHEN in_gaps > 0 THEN 'a gap has entries of a target' END
    ]) AS rule
FROM built
