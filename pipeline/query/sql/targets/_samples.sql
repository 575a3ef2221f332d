-- Samples with their text, which follows from the student's tokens.
SELECT *, spelled(student_ids, student_end) AS spelling FROM targets._stored
