-- The sparse KL: skl_mass is what a chunk's entries and REST add up to; $student: tokens of the vocabulary that both
-- share; $drawn: rows are draws, of which what no cell holds is left out.
SELECT
    sample_id,
    unnest([
        CASE WHEN skl_ids_low < 0 OR skl_ids_high >= $student THEN 'skl_ids has an id outside the vocabulary' END,
        CASE WHEN skl_count_low < 0 THEN 'skl_count is negative' END,
        CASE WHEN skl_rest_logprob_high > 1e-5 THEN 'skl_rest_logprob is no log-probability' END,
        CASE WHEN NOT $rest_unknown AND skl_rest_logprob_unknown > 0
            THEN 'skl_rest_logprob is NaN where REST is known' END,
        CASE WHEN skl_mass_high > 1 + 1e-5 OR (NOT $drawn AND skl_mass_low < 1 - 1e-5)
            THEN 'skl_logprob and REST do not sum to 1' END
    ]) AS rule
FROM built
