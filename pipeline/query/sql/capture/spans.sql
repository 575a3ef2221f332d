-- One row per span: what a conversation is made of, and what of it is taught. Plain text is one, and a stop behind it.
-- sample_id: the sample
-- span: number of the span in its sample, from 0
-- kind: text; template (what the chat template writes); system, user, result (what a tool answers), assistant, thinking, call; marker (opens or closes thinking); stop (ends an answer, or a document)
-- message: index of its message in the conversation, from 0; null of the template and of plain text
-- part: index of the tool call; of a marker 0 opens and 1 closes; else 0
-- learn: it is taught: its tokens have rows
-- start_byte: where it starts in the sample's text
-- end_byte: where it ends; of template, marker and stop where it starts
-- start_token: its first token, as in tokens
-- end_token: the token after its last
-- bytes: bytes of text
-- tokens: how many tokens it has
-- text: its text; null in a capture without it
-- spelled: what its tokens spell, of those without bytes the role, as <eot>
-- nats: -log of the probability that the teacher gives its tokens; null if it is not taught
-- bits_per_byte: the same in bits, per byte; null without bytes
SELECT
    sample_id,
    span,
    kind,
    nullif(message, -1) AS message,
    part,
    learn,
    start_byte,
    end_byte,
    start_token,
    end_token,
    end_byte - start_byte AS bytes,
    end_token - start_token AS tokens,
    readable(encode(text)[start_byte + 1:end_byte]) AS text,
    teacher_tokens_text(teacher_ids[start_token + 1:end_token]) AS spelled,
    known(-list_sum(logprobs)) AS nats,
    bits_per_byte_of(nats, bytes) AS bits_per_byte
FROM (
    SELECT *, taken(realised_logprob, row[start_token + 1:end_token]) AS logprobs
    FROM (
        SELECT
            sample_id,
            text,
            teacher_ids,
            realised_logprob,
            row,
            CAST(unnest(range(len(span_kind))) AS INTEGER) AS span,
            unnest(span_kind) AS kind,
            unnest(span_message) AS message,
            unnest(span_part) AS part,
            unnest(span_learn) AS learn,
            unnest(starts_of(span_byte_end)) AS start_byte,
            unnest(span_byte_end) AS end_byte,
            unnest(starts_of(span_token_end)) AS start_token,
            unnest(span_token_end) AS end_token
        FROM capture._samples
    )
)
