-- H-KL's target of every chunk: the normalised row, split at the common set.
-- entries, rest as in pkl.sql; w: the table of a projection. student_id is NULL outside the common set.
WITH
total AS (
    SELECT chunk, sum(exp(logprob)) AS mass
    FROM (SELECT chunk, logprob FROM entries UNION ALL SELECT chunk, logprob FROM rest)
    GROUP BY chunk
),
-- At most one student token per teacher token is in the common set.
pairs AS (
    SELECT teacher_id, student_id FROM w WHERE common
)
SELECT chunk, student_id, CAST(logprob - ln(mass) AS FLOAT) AS logprob
FROM entries JOIN total USING (chunk) LEFT JOIN pairs USING (teacher_id)
ORDER BY chunk, student_id IS NULL, logprob DESC, student_id
