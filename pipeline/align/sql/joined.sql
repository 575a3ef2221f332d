-- What samples several captures have in common: as training joins them, by id and by what both tokenizers see.
-- samples: (capture, sample_id, bytes, complete, text), capture counted from 0, text the md5 of its text or NULL;
-- $captures: how many there are. One result row per class of each capture, and with capture NULL of all together:
-- samples, those of them that two captures or more have alike, and the first ids.
WITH
-- Texts are compared where all captures store them, else their lengths alone.
compared AS (
    SELECT bool_and(text IS NOT NULL) AS by_text FROM samples
),
-- The captures that hold an id with the same bytes, a bit each.
version AS (
    SELECT sample_id, bytes, complete, CASE WHEN by_text THEN text END AS text, bit_or(1::BIGINT << capture) AS holders
    FROM samples, compared
    GROUP BY ALL
),
sample AS (
    SELECT sample_id, bit_or(holders) AS holders, max(bit_count(holders)) AS alike, count(*) AS versions
    FROM version
    GROUP BY sample_id
),
classed AS (
    SELECT
        sample_id,
        holders,
        alike,
        CASE
            WHEN versions > 1 THEN 'other_bytes'
            WHEN alike = $captures THEN 'in_all'
            WHEN alike > 1 THEN 'in_some'
            ELSE 'in_one'
        END AS class
    FROM sample
)
SELECT NULL AS capture, class, count(*) AS samples, count(*) FILTER (alike > 1) AS alike, min(sample_id, 10) AS ids
FROM classed
GROUP BY class
UNION ALL
SELECT of.capture, class, count(*), count(*) FILTER (alike > 1), min(sample_id, 10)
FROM classed, range($captures) AS of(capture)
WHERE (holders >> of.capture) & 1 = 1
GROUP BY of.capture, class
ORDER BY ALL
