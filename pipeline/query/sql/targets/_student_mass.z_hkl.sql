-- Mass of student tokens: that of the pairs of the common set.
-- Needs: h-kl
SELECT student_id, sum(exp(logprob)) AS mass
FROM (SELECT unnest(hkl_common_ids) AS student_id, unnest(hkl_common_logprob) AS logprob FROM targets._stored)
GROUP BY student_id
