-- Chunks of every sample: cut where both sequences end a token at the same byte.
-- student, teacher: (doc, pos, end_byte), pos counted from 0; eos left out. Gives the starts and ends of token spans.
WITH
-- Of tokens that end at the same byte (a snapped block) the last one carries the boundary; an end of 0 is no boundary.
student_end AS (
    SELECT doc, end_byte, max(pos) + 1 AS s_end FROM student WHERE end_byte > 0 GROUP BY doc, end_byte
),
teacher_end AS (
    SELECT doc, end_byte, max(pos) + 1 AS t_end FROM teacher WHERE end_byte > 0 GROUP BY doc, end_byte
),
-- Zero-width tokens before the first byte are set aside: the first chunk starts after them.
lead AS (
    SELECT
        doc,
        count(*) FILTER (WHERE side = 's') AS s_lead,
        count(*) FILTER (WHERE side = 't') AS t_lead
    FROM (
        SELECT doc, 's' AS side FROM student WHERE end_byte = 0
        UNION ALL
        SELECT doc, 't' AS side FROM teacher WHERE end_byte = 0
    )
    GROUP BY doc
),
-- A boundary is a byte at which both sides end a token.
cut AS (
    SELECT doc, s_end, t_end, coalesce(s_lead, 0) AS s_lead, coalesce(t_lead, 0) AS t_lead
    FROM student_end JOIN teacher_end USING (doc, end_byte) LEFT JOIN lead USING (doc)
)
SELECT
    doc,
    coalesce(lag(s_end) OVER sample, s_lead) AS s_start,
    s_end,
    coalesce(lag(t_end) OVER sample, t_lead) AS t_start,
    t_end
FROM cut
WINDOW sample AS (PARTITION BY doc ORDER BY s_end)
ORDER BY doc, s_end
