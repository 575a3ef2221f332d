-- One row per entry of each teacher row: the most probable tokens, or the tokens drawn.
-- Needs: rows
-- sample_id: the sample
-- pos: the token that the row predicts, as in tokens
-- rank: 0 for the most probable, or most often drawn, token
-- teacher_id: the entry's token
-- bytes: its bytes
-- token: its bytes as text
-- logprob: nats; rounded to the codec's step, of draws the log of their share
-- probability: the same as a probability; a row's sum to 1 with its rest
SELECT
    sample_id,
    pos,
    rank,
    teacher_id,
    teacher_bytes_of(teacher_id) AS bytes,
    teacher_text_of(teacher_id) AS token,
    logprob,
    exp(logprob) AS probability
FROM (
    SELECT
        sample_id,
        unnest(taken(predicted, unpacked.place)) AS pos,
        unnest(unpacked.rank) AS rank,
        teacher_id_of(unnest(codes)) AS teacher_id,
        unnest(unpacked.logprob) AS logprob
    -- a lambda would compute the list anew for each element
    FROM (SELECT *, token_of_row(row) AS predicted FROM capture._rows)
)
