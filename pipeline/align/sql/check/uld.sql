-- ULD: uld_mass is what a chunk's entries add up to.
SELECT
    sample_id,
    unnest([
        CASE WHEN uld_count_low < 0 THEN 'uld_count is negative' END,
        CASE WHEN uld_mass_high > 1 + 1e-5 THEN 'uld_logprob sums to more than 1' END,
        CASE WHEN factor_logprob_high > 2e-3 THEN 'factor_logprob is no log-probability' END
    ]) AS rule
FROM built
