-- ULD: uld_mass is what each chunk's entries add up to.
SELECT
    sample_id,
    unnest([
        CASE WHEN list_min(uld_count) < 0 THEN 'uld_count is negative' END,
        CASE WHEN list_max(uld_mass) > 1 + 1e-5 THEN 'uld_logprob sums to more than 1' END,
        CASE WHEN list_max(list_filter(factor_logprob, lambda v: NOT isnan(v))) > 2e-3
            THEN 'factor_logprob is no log-probability' END
    ]) AS rule
FROM built
