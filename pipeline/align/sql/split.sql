-- Targets of H-KL, GOLD, ULD and the sparse KL: the normalised row, split at the tokens that have a pair.
-- entries, rest as in pkl.sql; pairs: (teacher_id, student_id), at most one per teacher token. student_id is NULL
-- outside the pairs.
WITH
total AS (
    SELECT chunk, sum(exp(logprob)) AS mass
    FROM (SELECT chunk, logprob FROM entries UNION ALL SELECT chunk, logprob FROM rest)
    GROUP BY chunk
)
SELECT chunk, student_id, CAST(logprob - ln(mass) AS FLOAT) AS logprob
FROM entries JOIN total USING (chunk) LEFT JOIN pairs USING (teacher_id)
ORDER BY chunk, student_id IS NULL, logprob DESC, student_id
