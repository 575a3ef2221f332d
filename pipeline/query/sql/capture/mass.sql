-- One row per teacher token: how much of all probability lies on it, as a kept entry.
-- Needs: rows
-- teacher_id: the token
-- bytes: its bytes
-- token: its bytes as text
-- category: what kind of text it stands for, as in vocab
-- rows: rows that keep it
-- mass: its probabilities in these rows, added up
-- share: mass as a share of that of all rows, what they did not keep included
WITH
kept AS (
    SELECT code, count(*) AS rows, sum(exp(logprob)) AS mass
    FROM (SELECT unnest(codes) AS code, unnest(unpacked.logprob) AS logprob FROM capture._rows)
    GROUP BY code
),
total AS (
    SELECT (SELECT coalesce(sum(mass), 0) FROM kept) + coalesce(sum(list_sum(rest)), 0) AS mass FROM capture._rows
)
SELECT
    v.token_id AS teacher_id,
    v.bytes,
    v.token,
    c.category,
    coalesce(kept.rows, 0) AS rows,
    coalesce(kept.mass, 0) AS mass,
    coalesce(kept.mass, 0) / nullif(total.mass, 0) AS share
FROM capture._vocabulary AS v
JOIN capture._categories AS c USING (token_id)
LEFT JOIN kept USING (code)
CROSS JOIN total
