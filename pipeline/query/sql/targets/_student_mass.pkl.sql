-- Mass of student tokens: that of the teacher's tokens, each added up first, through W.
-- Needs: p-kl
WITH teacher AS (
    SELECT teacher_id, sum(exp(logprob)) AS mass
    FROM (SELECT unnest(pkl_ids) AS teacher_id, unnest(pkl_logprob) AS logprob FROM targets._stored)
    GROUP BY teacher_id
)
SELECT student_id, sum(weight * mass) AS mass
FROM targets._w JOIN teacher USING (teacher_id)
GROUP BY student_id
