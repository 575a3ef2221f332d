-- One part of a capture, in file order: what chunks and targets are built from.
SELECT
    sample_id,
    text,
    teacher_end,
    kept,
    topk_ids,
    topk_gap,
    rest_gap,
    realised_logprob,
    first_row,
    complete,
    -- eos closes a complete document; its id is compared, its bytes are none
    coalesce(complete AND teacher_ids[-1] = $eos_id, false) AS teacher_eos
FROM read_parquet($path)
