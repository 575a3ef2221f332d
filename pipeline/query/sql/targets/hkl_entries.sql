-- One row per entry of each chunk's target for h-kl.
-- Needs: h-kl
-- sample_id: the sample
-- chunk: the chunk, as in chunks
-- common: it is one of the pairs that are compared token by token; the others are compared as sorted lists
-- rank: 0 for the most probable of its kind
-- student_id: the pair's student token; null outside the pairs
-- bytes: its bytes
-- token: its bytes as text
-- logprob: nats at the targets' temperature; the teacher's
-- probability: the same as a probability
SELECT
    sample_id, chunk, common, rank, student_id, student_bytes_of(student_id) AS bytes,
    student_text_of(student_id) AS token, logprob, exp(logprob) AS probability
FROM (
    SELECT
        sample_id,
        true AS common,
        unnest(p.place) AS chunk,
        unnest(p.rank) AS rank,
        unnest(hkl_common_ids) AS student_id,
        unnest(hkl_common_logprob) AS logprob
    FROM (SELECT *, places(hkl_common_count, CAST(len(hkl_common_ids) AS INTEGER)) AS p FROM targets._stored)
    UNION ALL
    SELECT sample_id, false, unnest(p.place), unnest(p.rank), NULL, unnest(hkl_other_logprob)
    FROM (SELECT *, places(hkl_other_count, CAST(len(hkl_other_logprob) AS INTEGER)) AS p FROM targets._stored)
)
