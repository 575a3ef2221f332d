-- Byte-prefix, root and interior: kept teacher tokens as the student tokens that begin what is left of them.
-- entries: (place, teacher_id, logprob); rest: (place, logprob), of roots only; emitted: (place, hex), empty at a root;
-- teacher: (token_id, hex); student: (token_id, hex, byte_fallback), hex empty where a token has no bytes;
-- encoded: (hex, token_id), the first token of the student's own encoding of what is left of a teacher token, where those
-- bytes are a text; roles: (teacher_id, student_id). One result row per target entry, and one with student_id NULL for the tail.
WITH
-- Kept tokens that start with what is emitted, without it.
remaining AS (
    SELECT
        place,
        teacher_id,
        exp(logprob) AS p,
        substr(teacher.hex, length(emitted.hex) + 1) AS hex,
        emitted.hex AS before
    FROM entries JOIN emitted USING (place) JOIN teacher ON teacher.token_id = entries.teacher_id
    WHERE starts_with(teacher.hex, emitted.hex)
),
-- The student token that stands for some bytes: an ordinary one before <0xHH>, then the lower id.
spelling AS (
    SELECT hex, token_id FROM student WHERE hex <> ''
    QUALIFY row_number() OVER (PARTITION BY hex ORDER BY byte_fallback, token_id) = 1
),
-- Two hex digits are a byte. Of bytes that are no text the longest prefix that is a student token wins.
prefixes AS (
    SELECT place, teacher_id, unnest(range(2, length(hex) + 1, 2)) AS digits, left(hex, digits) AS prefix FROM remaining
),
longest AS (
    SELECT place, teacher_id, arg_max(spelling.token_id, digits) AS student_id
    FROM prefixes JOIN spelling ON spelling.hex = prefixes.prefix
    GROUP BY place, teacher_id
),
routed AS (
    SELECT
        place,
        coalesce(encoded.token_id, longest.student_id, CASE WHEN before = '' THEN roles.student_id END) AS student_id,
        p
    FROM remaining
    LEFT JOIN encoded USING (hex)
    LEFT JOIN longest USING (place, teacher_id)
    LEFT JOIN roles USING (teacher_id)
    UNION ALL
    SELECT place, NULL, exp(logprob) FROM rest
),
total AS (
    SELECT place, sum(p) AS mass FROM routed GROUP BY place
)
SELECT place, student_id, CAST(CASE WHEN sum(p) = 0 THEN '-inf'::DOUBLE ELSE ln(sum(p) / any_value(mass)) END AS FLOAT)
    AS logprob
FROM routed JOIN total USING (place)
GROUP BY place, student_id
ORDER BY place, student_id IS NULL, logprob DESC, student_id
