-- Byte-prefix, child: groups of teacher tokens without a student twin that the student's token has begun to spell.
-- entries, rest, teacher, student as in prefix.sql, of roots only; begun: (place, hex), the bytes of the
-- student's token. One result row per group: the ranks of the student tokens that start with its next bytes, and
-- the log of its mass.
WITH
total AS (
    SELECT place, sum(exp(logprob)) AS mass
    FROM (SELECT place, logprob FROM entries UNION ALL SELECT place, logprob FROM rest)
    GROUP BY place
),
alone AS (
    SELECT place, hex, sum(exp(logprob) / mass) AS p
    FROM entries JOIN total USING (place) JOIN teacher ON teacher.token_id = entries.teacher_id
    WHERE hex <> '' AND hex NOT IN (SELECT hex FROM student WHERE hex <> '')
    GROUP BY place, hex
),
-- The shortest of them that a token starts with names its group.
member AS (
    SELECT alone.place, any_value(alone.p) AS p, arg_min(head.hex, length(head.hex)) AS hex
    FROM alone JOIN alone AS head ON head.place = alone.place AND starts_with(alone.hex, head.hex)
    GROUP BY alone.place, alone.hex
),
joined AS (
    SELECT place, hex, sum(p) AS p FROM member GROUP BY place, hex
),
next AS (
    SELECT place, joined.hex, substr(joined.hex, length(begun.hex) + 1) AS bytes, p
    FROM joined JOIN begun USING (place)
    WHERE begun.hex <> '' AND starts_with(joined.hex, begun.hex) AND joined.hex <> begun.hex
),
ranked AS (
    SELECT hex, row_number() OVER (ORDER BY hex, token_id) - 1 AS rank FROM student WHERE hex <> ''
)
SELECT place, min(rank) AS low, max(rank) + 1 AS high, CAST(ln(any_value(p)) AS FLOAT) AS logprob
FROM next JOIN ranked ON starts_with(ranked.hex, next.bytes)
GROUP BY place, next.hex
ORDER BY place, next.hex
