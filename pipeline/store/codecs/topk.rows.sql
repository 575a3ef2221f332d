-- Rows whose entries are the most probable tokens.
-- Needs: rows
SELECT
    sample_id, text, teacher_ids, teacher_end, realised_logprob, space_logprob, first_row, complete, snapped,
    row, span_kind, span_byte_end, span_token_end, span_message, span_learn, messages,
    CAST(kept AS INTEGER[]) AS kept,
    list_transform(
        rest_gap, lambda gap: CASE gap WHEN 65535 THEN 0.0 WHEN 65534 THEN NULL ELSE exp(-CAST(gap AS DOUBLE) * getvariable('step')) END
    ) AS rest,
    NULL::DOUBLE[] AS entropy,
    topk_codes AS codes,
    unpack_rows(kept, topk_codes, topk_gap) AS unpacked
FROM capture._samples
