-- Byte-prefix: prefix_mass is what a token's entries and REST add up to, child_mass its child groups; $student: tokens
-- of the student's vocabulary; $text: those with bytes; $drawn: rows are draws, of which what no cell holds is left out.
SELECT
    sample_id,
    unnest([
        CASE WHEN prefix_ids_low < 0 OR prefix_ids_high >= $student
            THEN 'prefix_ids has an id outside the student''s vocabulary' END,
        CASE WHEN prefix_count_low < 0 OR child_count_low < 0 THEN 'a count of byte-prefix is negative' END,
        CASE WHEN prefix_rest_logprob_high > 1e-5 THEN 'prefix_rest_logprob is no log-probability' END,
        CASE WHEN NOT $rest_unknown AND prefix_rest_logprob_unknown > 0
            THEN 'prefix_rest_logprob is NaN where REST is known' END,
        CASE WHEN prefix_mass_high > 1 + 1e-5 OR (NOT $drawn AND prefix_mass_low < 1 - 1e-5)
            THEN 'prefix_logprob and REST do not sum to 1' END,
        CASE WHEN child_low_low < 0 OR child_high_high > $text OR child_range_low < 1
            THEN 'a child range is empty or outside the student''s tokens' END,
        CASE WHEN child_mass_high > 1 + 1e-5 THEN 'child_logprob sums to more than 1' END
    ]) AS rule
FROM built
