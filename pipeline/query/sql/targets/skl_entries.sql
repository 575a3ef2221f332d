-- One row per entry of each chunk's target for sparse-kl.
-- Needs: sparse-kl
-- sample_id: the sample
-- chunk: the chunk, as in chunks
-- rank: 0 for the most probable entry
-- teacher_id: the entry's token, which is the student's too
-- logprob: nats at the targets' temperature
-- probability: the same as a probability; a chunk's sum to 1 with rest
-- rest: probability of all else; null where it is unknown at this temperature
SELECT sample_id, chunk, rank, teacher_id, logprob, exp(logprob) AS probability, exp(known(rest_logprob)) AS rest
FROM (
    SELECT
        sample_id,
        unnest(p.place) AS chunk,
        unnest(p.rank) AS rank,
        unnest(skl_ids) AS teacher_id,
        unnest(skl_logprob) AS logprob,
        unnest(list_select(skl_rest_logprob, list_transform(p.place, lambda place: place + 1))) AS rest_logprob
    FROM (SELECT *, places(skl_count, CAST(len(skl_ids) AS INTEGER)) AS p FROM targets._stored)
)
