-- One row per teacher token, as it stands in the text.
-- sample_id: the sample
-- pos: number of the token in its sample, from 0
-- teacher_id: the token
-- bytes: its bytes in the vocabulary; none for specials
-- token: its bytes as text, what is not UTF-8 written like \xe6
-- start_byte: where it starts in the sample's text
-- end_byte: where it ends
-- span: the span it is of, as in spans
-- kind: of that span: text, template, user, assistant, stop, ...
-- learn: it is taught
-- logprob: nats; log-probability that the teacher gives it there; null for a token without a row, or where an import does not say
-- surprise: the same in bits, positive
-- kept: entries kept in its row; of draws, different tokens drawn
-- rest: probability of all that the row did not keep; null for draws
-- entropy: nats; of the whole row, null unless the capture holds draws
-- space_probability: that a token starting with a space stands here; null where the engine did not say
SELECT
    t.sample_id,
    t.pos,
    t.teacher_id,
    teacher_bytes_of(t.teacher_id) AS bytes,
    teacher_text_of(t.teacher_id) AS token,
    t.start_byte,
    t.end_byte,
    t.span,
    t.kind,
    t.learn,
    known(t.logprob) AS logprob,
    -known(t.logprob) / ln(2) AS surprise,
    t.kept,
    t.rest,
    t.entropy,
    exp(t.space_logprob) AS space_probability
FROM (
    SELECT
        sample_id,
        CAST(unnest(range(len(teacher_ids))) AS INTEGER) AS pos,
        unnest(teacher_ids) AS teacher_id,
        unnest(starts_of(teacher_end)) AS start_byte,
        unnest(teacher_end) AS end_byte,
        unnest(span_of_token) AS span,
        unnest(taken(span_kind, span_of_token)) AS kind,
        unnest(taken(span_learn, span_of_token)) AS learn,
        unnest(taken(realised_logprob, row)) AS logprob,
        unnest(taken(kept, row)) AS kept,
        unnest(taken(rest, row)) AS rest,
        unnest(taken(entropy, row)) AS entropy,
        unnest(taken(space_logprob, row)) AS space_logprob
    FROM (
        SELECT *, steps(CAST(span_token_end AS INTEGER[]), CAST(len(teacher_ids) AS INTEGER)) AS span_of_token
        FROM capture._rows
    )
) AS t
