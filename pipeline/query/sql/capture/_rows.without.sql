-- Of a subset without the teacher's distributions.
SELECT
    sample_id, text, teacher_ids, teacher_end, realised_logprob, space_logprob, first_row, complete, snapped,
    row, span_kind, span_byte_end, span_token_end, span_message, span_learn, messages,
    NULL::INTEGER[] AS kept,
    NULL::DOUBLE[] AS rest,
    NULL::DOUBLE[] AS entropy
FROM capture._samples
