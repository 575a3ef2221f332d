-- What holds of every target. built: the columns of the target table but its entries, and teacher_byte, the teacher's
-- byte ends; $student: tokens of the student's vocabulary. A result row is a sample and a rule that it breaks.
WITH
-- Byte at which each chunk ends, by either side; a chunk of no tokens ends at byte 0.
cuts AS (
    SELECT
        *,
        list_select(list_prepend(0, student_end), list_transform(chunk_student_end, lambda i: i + 1)) AS student_cut,
        list_select(list_prepend(0, teacher_byte), list_transform(chunk_teacher_end, lambda i: i + 1)) AS teacher_cut
    FROM built
)
SELECT
    sample_id,
    unnest([
        CASE WHEN list_min(student_ids) < 0 OR list_max(student_ids) >= $student
            THEN 'student_ids has an id outside the student''s vocabulary' END,
        CASE WHEN len(student_end) <> len(student_ids) THEN 'student_end has another length than its tokens' END,
        CASE WHEN student_cut <> teacher_cut THEN 'the two sides of a chunk cover different bytes' END,
        CASE WHEN list_sort(student_cut) <> student_cut THEN 'chunks overlap' END,
        CASE WHEN len(list_distinct(chunk_student_end)) < len(chunk_student_end)
                OR len(list_distinct(chunk_teacher_end)) < len(chunk_teacher_end)
            THEN 'a chunk has no tokens on one side' END,
        -- A boundary behind the last chunk is one that the walk missed.
        CASE WHEN list_has_any(
                list_filter(student_end, lambda e: e > coalesce(student_cut[-1], 0)),
                list_filter(teacher_byte, lambda e: e > coalesce(student_cut[-1], 0))
            ) THEN 'chunks stop before the last common boundary' END,
        CASE WHEN teacher_entropy < -1e-5 THEN 'teacher_entropy is negative' END,
        CASE WHEN teacher_top1 <= 0 OR (teacher_top1 > 1 + 1e-5 AND NOT isnan(teacher_top1))
            THEN 'teacher_top1 is no probability' END,
        CASE WHEN list_max(list_filter(teacher_logprob, lambda v: NOT isnan(v))) > 2e-3
            THEN 'teacher_logprob is no log-probability' END
    ]) AS rule
FROM cuts
