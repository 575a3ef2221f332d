-- What holds of every target. built: of summary_batch, a row per sample; $student: tokens of the student's vocabulary;
-- $chat: of conversations. chunk_*_cut: ends of chunks, chunk_*_gap: ends of those without a target (gaps).
-- A result row is a sample and a rule that it breaks.
WITH
-- Byte at which each chunk ends, by either side. Of a text only the first may be a gap, of tokens without a byte, on one
-- side perhaps of none.
cuts AS (
    SELECT
        *,
        list_select(student_end, chunk_student_end_cut) AS student_cut,
        list_select(teacher_end, chunk_teacher_end_cut) AS teacher_cut,
        NOT $chat AND (len(chunk_student_end_gap) > 1
            OR coalesce(student_end[chunk_student_end_gap[1]], 0) <> 0
            OR coalesce(teacher_end[chunk_teacher_end_gap[1]], 0) <> 0) AS gap_has_bytes,
        student_end[coalesce(chunk_student_end[-1], 0) + 1:] AS student_left,
        teacher_end[coalesce(chunk_teacher_end[-1], 0) + 1:] AS teacher_left
    FROM built
)
SELECT
    sample_id,
    unnest([
        CASE WHEN student_ids_low < 0 OR student_ids_high >= $student
            THEN 'student_ids has an id outside the student''s vocabulary' END,
        CASE WHEN len(student_end) <> len(student_ids) THEN 'student_end has another length than its tokens' END,
        CASE WHEN student_end_step < 0 THEN 'student_end decreases' END,
        CASE WHEN student_cut IS DISTINCT FROM teacher_cut OR gap_has_bytes
            THEN 'the two sides of a chunk cover different bytes' END,
        CASE WHEN chunk_student_end_step < 1 OR chunk_teacher_end_step < 1 THEN 'a chunk has no tokens on one side' END,
        -- A boundary behind the last chunk is one that the walk missed; tokens without a byte make none.
        CASE WHEN list_has_any(
                list_filter(student_left, lambda e: e > coalesce(student_cut[-1], 0)),
                list_filter(teacher_left, lambda e: e > coalesce(student_cut[-1], 0))
            ) THEN 'chunks stop before the last common boundary' END,
        CASE WHEN teacher_entropy < -1e-5 THEN 'teacher_entropy is negative' END,
        CASE WHEN teacher_top1 <= 0 OR (teacher_top1 > 1 + 1e-5 AND NOT isnan(teacher_top1))
            THEN 'teacher_top1 is not a probability' END,
        CASE WHEN teacher_logprob_high > 2e-3 THEN 'teacher_logprob is not a log-probability' END
    ]) AS rule
FROM cuts
