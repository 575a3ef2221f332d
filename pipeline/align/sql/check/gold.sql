-- GOLD: gold_mass is what a chunk's matched and other entries add up to; $student: tokens of the student's vocabulary.
SELECT
    sample_id,
    unnest([
        CASE WHEN gold_ids_low < 0 OR gold_ids_high >= $student
            THEN 'gold_ids has an id outside the student''s vocabulary' END,
        CASE WHEN gold_count_low < 0 OR gold_other_count_low < 0 THEN 'a count of GOLD is negative' END,
        CASE WHEN gold_mass_high > 1 + 1e-5 THEN 'gold_logprob and gold_other_logprob sum to more than 1' END,
        CASE WHEN factor_logprob_high > 2e-3 THEN 'factor_logprob is no log-probability' END
    ]) AS rule
FROM built
