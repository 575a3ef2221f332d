-- One row per group of teacher tokens that a student token has begun to spell, for byte-prefix.
-- Needs: byte-prefix
-- sample_id: the sample
-- pos: the student token that comes next, as in student_tokens
-- number: number of the group at this token, from 0
-- low: first of the student tokens that go on spelling it, as a rank among text tokens in order of (bytes, id)
-- high: rank after the last of them
-- logprob: nats; log of the group's mass
-- probability: the same as a probability
SELECT sample_id, pos, number, low, high, logprob, exp(logprob) AS probability
FROM (
    SELECT
        sample_id,
        unnest(p.place) AS pos,
        unnest(p.rank) AS number,
        unnest(child_low) AS low,
        unnest(child_high) AS high,
        unnest(child_logprob) AS logprob
    FROM (SELECT *, places(child_count, CAST(len(child_low) AS INTEGER)) AS p FROM targets._stored)
)
