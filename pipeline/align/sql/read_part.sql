-- One part of a capture, in file order: what chunks and targets are built from.
SELECT
    -- tau_rest_odds is among them where the capture has it
    * EXCLUDE (snapped),
    -- eos closes a complete document; its id is compared, its bytes are none
    coalesce(complete AND teacher_ids[-1] = $eos_id, false) AS teacher_eos
FROM read_parquet($path)
