-- ALM: what its debiasing reads.
SELECT
    sample_id,
    unnest([
        CASE WHEN alm_space_logprob_high > 2e-3 THEN 'alm_space_logprob is no log-probability' END
    ]) AS rule
FROM built
