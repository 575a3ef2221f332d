-- Rows whose entries are sampled tokens.
-- Needs: rows
SELECT
    sample_id, text, teacher_ids, teacher_end, realised_logprob, space_logprob, first_row, complete, snapped,
    row, span_kind, span_byte_end, span_token_end, span_message, span_learn, messages,
    CAST(drawn AS INTEGER[]) AS kept,
    NULL::DOUBLE[] AS rest,
    CAST(entropy AS DOUBLE[]) AS entropy,
    draw_codes AS codes,
    unpack_rows(drawn, draw_codes, draw_count) AS unpacked
FROM capture._samples
