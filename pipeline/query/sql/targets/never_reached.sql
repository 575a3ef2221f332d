-- Student tokens that no target gives any probability, those that the text uses most first.
-- Needs: student_mass
-- student_id: the token
-- bytes: its bytes
-- token: its bytes as text
-- role: bos, eos, ...; null for text
-- category: what kind of text it stands for, as in student_vocab
-- kind: how W reaches the teacher from it (by its largest weight): exact, pieces, role, ...; none
-- seen: how often it stands in what is taught, where the teacher should have expected it
SELECT v.token_id AS student_id, v.bytes, v.token, v.role, c.category, coalesce(w.kind, 'none') AS kind,
    coalesce(s.seen, 0) AS seen
FROM targets._student_vocabulary AS v
JOIN targets._student_categories AS c USING (token_id)
LEFT JOIN (SELECT student_id, arg_max(kind, weight) AS kind FROM targets._w GROUP BY student_id) AS w
    ON w.student_id = v.token_id
LEFT JOIN (
    SELECT student_id, count(*) AS seen
    FROM (
        SELECT unnest(CASE WHEN learn IS NULL THEN student_ids ELSE list_where(student_ids, learn) END) AS student_id
        FROM targets._stored
    )
    GROUP BY student_id
) AS s ON s.student_id = v.token_id
LEFT JOIN targets._student_mass AS m ON m.student_id = v.token_id
WHERE coalesce(m.mass, 0) = 0 AND v.role IS DISTINCT FROM 'hole'
ORDER BY seen DESC, v.token_id
