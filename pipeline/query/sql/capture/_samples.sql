-- Samples with the row of each token and with their spans: plain text is one, and a stop where eos closes it.
SELECT
    * EXCLUDE (closed),
    row_of_token(first_row, span_token_end, span_learn) AS row
FROM (
    SELECT
        * REPLACE (
            coalesce(span_kind, CASE WHEN closed THEN ['text', 'stop'] ELSE ['text'] END) AS span_kind,
            coalesce(span_byte_end, list_resize([]::INTEGER[], 1 + closed::INTEGER, teacher_end[-1])) AS span_byte_end,
            coalesce(
                span_token_end,
                CASE WHEN closed THEN [len(teacher_ids) - 1, len(teacher_ids)] ELSE [len(teacher_ids)] END
            ) AS span_token_end,
            coalesce(span_message, list_resize([]::INTEGER[], 1 + closed::INTEGER)) AS span_message,
            coalesce(span_part, list_resize([]::INTEGER[], 1 + closed::INTEGER, 0)) AS span_part,
            coalesce(span_learn, list_resize([]::BOOLEAN[], 1 + closed::INTEGER, true)) AS span_learn
        )
    FROM (SELECT *, coalesce(complete AND teacher_ids[-1] = getvariable('teacher_eos'), false) AS closed FROM capture._stored)
)
