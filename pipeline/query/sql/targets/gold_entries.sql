-- One row per entry of each chunk's target for gold.
-- Needs: gold
-- sample_id: the sample
-- chunk: the chunk, as in chunks
-- matched: it has a student token of equal bytes; the others are compared as sorted lists
-- rank: 0 for the most probable of its kind
-- student_id: the student token of equal bytes; null without one
-- bytes: its bytes
-- token: its bytes as text
-- logprob: nats at the targets' temperature; the teacher's
-- probability: the same as a probability
SELECT
    sample_id, chunk, matched, rank, student_id, student_bytes_of(student_id) AS bytes,
    student_text_of(student_id) AS token, logprob, exp(logprob) AS probability
FROM (
    SELECT
        sample_id,
        true AS matched,
        unnest(p.place) AS chunk,
        unnest(p.rank) AS rank,
        unnest(gold_ids) AS student_id,
        unnest(gold_logprob) AS logprob
    FROM (SELECT *, places(gold_count, CAST(len(gold_ids) AS INTEGER)) AS p FROM targets._stored)
    UNION ALL
    SELECT sample_id, false, unnest(p.place), unnest(p.rank), NULL, unnest(gold_other_logprob)
    FROM (SELECT *, places(gold_other_count, CAST(len(gold_other_logprob) AS INTEGER)) AS p FROM targets._stored)
)
