-- The teacher's probability by kind of token, and how it gets to the student; shares of all, so that they sum to 1.
-- Needs: capture, rows
-- category: kind of teacher token, as in teacher_vocab; 'not kept' for what rows did not keep
-- tokens: teacher tokens of this kind
-- mass: share of all the teacher's probability
-- exact: of it, on tokens that a student token equals (by bytes or by role)
-- pieces: of it, on tokens that only pieces of a student token reach
-- moved: of it, on unreached tokens whose mass moves to their longest prefix
-- lost: of it, on unreached tokens without one: it goes to the tail mass
-- rest: of it, not kept in any row
WITH
reached AS (
    SELECT teacher_id, bool_or(kind IN ('exact', 'role')) AS exact FROM targets._w GROUP BY teacher_id
),
kept AS (
    SELECT
        m.category,
        m.share,
        CASE WHEN r.exact THEN 'exact' WHEN r.teacher_id IS NOT NULL THEN 'pieces'
             WHEN u.moved_to IS NOT NULL THEN 'moved' ELSE 'lost' END AS way
    FROM capture.mass AS m LEFT JOIN reached AS r USING (teacher_id) LEFT JOIN targets._unreached AS u USING (teacher_id)
    WHERE m.category IS NOT NULL
)
SELECT
    category,
    count(*) AS tokens,
    sum(share) AS mass,
    coalesce(sum(share) FILTER (WHERE way = 'exact'), 0) AS exact,
    coalesce(sum(share) FILTER (WHERE way = 'pieces'), 0) AS pieces,
    coalesce(sum(share) FILTER (WHERE way = 'moved'), 0) AS moved,
    coalesce(sum(share) FILTER (WHERE way = 'lost'), 0) AS lost,
    0.0 AS rest
FROM kept GROUP BY category
UNION ALL
SELECT 'not kept', NULL, 1 - sum(share), 0, 0, 0, 0, 1 - sum(share) FROM capture.mass
ORDER BY mass DESC
