-- One row per entry of each chunk's target for p-kl.
-- Needs: p-kl
-- sample_id: the sample
-- chunk: the chunk, as in chunks
-- rank: 0 for the most probable entry
-- teacher_id: the entry's teacher token, one that W reaches
-- logprob: nats at the targets' temperature, after unreached mass moved
-- probability: the same as a probability; a chunk's sum to 1 with rest
-- rest: probability of all else; null where it is unknown at this temperature
SELECT sample_id, chunk, rank, teacher_id, logprob, exp(logprob) AS probability, exp(known(rest_logprob)) AS rest
FROM (
    SELECT
        sample_id,
        unnest(p.place) AS chunk,
        unnest(p.rank) AS rank,
        unnest(pkl_ids) AS teacher_id,
        unnest(pkl_logprob) AS logprob,
        unnest(list_select(pkl_rest_logprob, list_transform(p.place, lambda place: place + 1))) AS rest_logprob
    FROM (SELECT *, places(pkl_count, CAST(len(pkl_ids) AS INTEGER)) AS p FROM targets._stored)
)
