-- ALM: what its debiasing reads.
SELECT
    sample_id,
    unnest([
        CASE WHEN list_max(list_filter(alm_space_logprob, lambda v: NOT isnan(v))) > 2e-3
            THEN 'alm_space_logprob is no log-probability' END
    ]) AS rule
FROM built
