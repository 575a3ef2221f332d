-- GOLD: gold_mass is what each chunk's matched and other entries add up to; $student: tokens of the student's vocabulary.
SELECT
    sample_id,
    unnest([
        CASE WHEN gold_ids_low < 0 OR gold_ids_high >= $student
            THEN 'gold_ids has an id outside the student''s vocabulary' END,
        CASE WHEN list_min(gold_count) < 0 OR list_min(gold_other_count) < 0 THEN 'a count of GOLD is negative' END,
        CASE WHEN list_max(gold_mass) > 1 + 1e-5 THEN 'gold_logprob and gold_other_logprob sum to more than 1' END,
        CASE WHEN list_max(list_filter(factor_logprob, lambda v: NOT isnan(v))) > 2e-3
            THEN 'factor_logprob is no log-probability' END
    ]) AS rule
FROM built
