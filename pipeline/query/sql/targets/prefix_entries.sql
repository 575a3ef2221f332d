-- One row per entry of each student token's target for byte-prefix.
-- Needs: byte-prefix
-- sample_id: the sample
-- pos: the student token that the target predicts, as in student_tokens
-- rank: 0 for the most probable entry
-- student_id: the entry's token
-- bytes: its bytes
-- token: its bytes as text
-- logprob: nats at the targets' temperature
-- probability: the same as a probability; a target's sum to 1 with rest
-- rest: probability of all else
SELECT
    sample_id, pos, rank, student_id, student_bytes_of(student_id) AS bytes, student_text_of(student_id) AS token,
    logprob, exp(logprob) AS probability, exp(known(rest_logprob)) AS rest
FROM (
    SELECT
        sample_id,
        unnest(p.place) AS pos,
        unnest(p.rank) AS rank,
        unnest(prefix_ids) AS student_id,
        unnest(prefix_logprob) AS logprob,
        unnest(list_select(prefix_rest_logprob, list_transform(p.place, lambda place: place + 1))) AS rest_logprob
    FROM (SELECT *, places(prefix_count, CAST(len(prefix_ids) AS INTEGER)) AS p FROM targets._stored)
)
