-- Merge 'mean': the mean of each chunk's log-probabilities over the union of its rows' kept ids.
-- entries: (chunk, row, teacher_id, logprob); rest: (chunk, row, logprob); $size: the teacher's vocabulary.
-- One result row per id, and one with teacher_id NULL for what they leave to 1.
WITH
-- Log of what a row's kept entries and the tail mass add up to, and how many ids it did not keep.
total AS (
    SELECT chunk, row, ln(sum(exp(logprob))) AS scale, $size - count(teacher_id) AS unkept
    FROM (SELECT chunk, row, teacher_id, logprob FROM entries UNION ALL SELECT chunk, row, NULL, logprob FROM rest)
    GROUP BY chunk, row
),
-- The tail mass spread evenly over the ids not kept; -infinity where there is none.
floor AS (
    SELECT chunk, row, CASE WHEN unkept > 0 THEN logprob - scale - ln(unkept) ELSE '-inf'::DOUBLE END AS logprob
    FROM rest JOIN total USING (chunk, row)
),
-- Every id of the chunk in every row of the chunk.
cells AS (
    SELECT chunk, row, teacher_id, coalesce(entries.logprob - scale, floor.logprob) AS logprob
    FROM (SELECT DISTINCT chunk, teacher_id FROM entries)
    JOIN floor USING (chunk)
    JOIN total USING (chunk, row)
    LEFT JOIN entries USING (chunk, row, teacher_id)
),
means AS (
    SELECT chunk, teacher_id, avg(logprob) AS logprob FROM cells GROUP BY chunk, teacher_id
)
SELECT chunk, teacher_id, logprob FROM means WHERE logprob > '-inf'::DOUBLE
UNION ALL
SELECT chunk, NULL, CASE WHEN sum(exp(logprob)) < 1 THEN ln(1 - sum(exp(logprob))) ELSE '-inf'::DOUBLE END
FROM means GROUP BY chunk
