-- One row per entry of each chunk's target for uld.
-- Needs: uld
-- sample_id: the sample
-- chunk: the chunk, as in chunks
-- rank: 0 for the most probable entry
-- logprob: nats at the targets' temperature
-- probability: the same as a probability
SELECT sample_id, chunk, rank, logprob, exp(logprob) AS probability
FROM (
    SELECT sample_id, unnest(p.place) AS chunk, unnest(p.rank) AS rank, unnest(uld_logprob) AS logprob
    FROM (SELECT *, places(uld_count, CAST(len(uld_logprob) AS INTEGER)) AS p FROM targets._stored)
)
