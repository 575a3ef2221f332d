-- One row per entry of W: how a student token spreads over teacher tokens.
-- student_id: row
-- student_token: its bytes as text
-- teacher_id: column
-- weight: a row's sum to 1
-- kind: exact, pieces, role, reverse, random
-- common: the pair is in h-kl's common set
SELECT student_id, student_text_of(student_id) AS student_token, teacher_id, weight, kind, common FROM targets._w
