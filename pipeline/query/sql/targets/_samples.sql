-- Samples with their text, which follows from the student's tokens, and the byte at which each chunk ends.
SELECT
    *,
    spelled(student_ids, student_end) AS spelling,
    -- an end of 0 tokens (only such as are 0 bytes wide before it) is no index: null
    list_transform(list_select(student_end, CAST(chunk_student_end AS BIGINT[])), lambda one: coalesce(one, 0)) AS chunk_end
FROM targets._stored
