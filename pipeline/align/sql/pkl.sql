-- P-KL's target of every chunk, from its one teacher row.
-- entries: (chunk, teacher_id, logprob); rest: (chunk, logprob); w, unreached: the tables of a projection;
-- $unreached: prefix | rest | none; $closed: the tail mass is left out (merge mean, or unknown). One result row per
-- target entry, and one with teacher_id NULL for the tail.
WITH
-- What a row's kept entries and the tail mass add up to (the codec rounds each of them).
total AS (
    SELECT chunk, sum(exp(logprob)) AS mass
    FROM (SELECT chunk, logprob FROM entries UNION ALL SELECT chunk, logprob FROM rest)
    GROUP BY chunk
),
-- Reached tokens keep their mass; the others hand it to their prefix, to the tail mass (NULL), or lose it.
routed AS (
    SELECT
        chunk,
        CASE WHEN missing.teacher_id IS NULL THEN entries.teacher_id
             WHEN $unreached = 'prefix' THEN missing.moved_to
        END AS teacher_id,
        exp(logprob) / mass AS p
    FROM entries JOIN total USING (chunk) LEFT JOIN unreached AS missing USING (teacher_id)
    WHERE missing.teacher_id IS NULL OR $unreached <> 'none'
    UNION ALL
    SELECT chunk, NULL, exp(logprob) / mass FROM rest JOIN total USING (chunk)
),
merged AS (
    SELECT chunk, teacher_id, sum(p) AS p FROM routed
    WHERE teacher_id IS NOT NULL OR NOT $closed
    GROUP BY chunk, teacher_id
),
-- One, except where mass was left out.
remaining AS (
    SELECT chunk, sum(p) AS mass FROM merged GROUP BY chunk
)
SELECT
    chunk,
    teacher_id,
    CAST(CASE WHEN mass = 0 THEN 0 WHEN p = 0 THEN '-inf'::DOUBLE ELSE ln(p / mass) END AS FLOAT) AS logprob
FROM merged JOIN remaining USING (chunk)
ORDER BY chunk, teacher_id IS NULL, logprob DESC, teacher_id
