-- Rows through a sparse map, the most probable entries kept: what project_rows computes for any map.
-- entries: (chunk, teacher_id, logprob); rest: (chunk, logprob); map: (teacher_id, to_id, share), to_id NULL for the tail,
-- no row where mass is left out; $entries: most entries of a target; $closed: the tail mass is left out, and what lies
-- beyond $entries too. One result row per target entry, and one with to_id NULL for the tail.
WITH
routed AS (
    SELECT chunk, to_id, sum(exp(logprob) * share) AS p
    FROM entries JOIN map USING (teacher_id) GROUP BY chunk, to_id
),
-- What goes to the tail mass by the map joins what the row had not kept.
cells AS (
    SELECT chunk, to_id, sum(p) AS p
    FROM (SELECT chunk, to_id, p FROM routed UNION ALL SELECT chunk, NULL, exp(logprob) FROM rest)
    WHERE to_id IS NOT NULL OR NOT $closed
    GROUP BY chunk, to_id
),
total AS (
    SELECT chunk, sum(p) AS mass FROM cells GROUP BY chunk
),
-- The order is that of the values stored.
ranked AS (
    SELECT
        chunk,
        to_id,
        p / mass AS p,
        row_number() OVER (
            PARTITION BY chunk ORDER BY to_id IS NULL, CAST(ln(p / mass) AS FLOAT) DESC, to_id
        ) AS place
    FROM cells JOIN total USING (chunk) WHERE mass > 0
),
kept AS (
    SELECT chunk, CASE WHEN place <= $entries THEN to_id END AS to_id, sum(p) AS p
    FROM ranked WHERE NOT $closed OR place <= $entries GROUP BY ALL
)
SELECT
    chunk,
    to_id,
    CAST(CASE WHEN p = 0 THEN '-inf'::DOUBLE
        ELSE ln(p / CASE WHEN $closed THEN sum(p) OVER (PARTITION BY chunk) ELSE 1 END) END AS FLOAT) AS logprob
FROM kept
ORDER BY chunk, to_id IS NULL, logprob DESC, to_id
