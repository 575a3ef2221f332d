-- One row per teacher token that no row of W reaches.
-- teacher_id: the token
-- moved_to: the reached teacher token that takes its mass, the longest prefix that is a student token; null: the tail mass does
SELECT teacher_id, moved_to FROM targets._unreached
