-- P-KL: pkl_mass is what a chunk's entries and REST add up to; $teacher: tokens of the teacher's vocabulary; $drawn: rows
-- are draws, of which what no cell holds is left out.
SELECT
    sample_id,
    unnest([
        CASE WHEN pkl_ids_low < 0 OR pkl_ids_high >= $teacher
            THEN 'pkl_ids has an id outside the teacher''s vocabulary' END,
        CASE WHEN pkl_count_low < 0 THEN 'pkl_count is negative' END,
        CASE WHEN pkl_rest_logprob_high > 1e-5 THEN 'pkl_rest_logprob is no log-probability' END,
        CASE WHEN NOT $rest_unknown AND pkl_rest_logprob_unknown > 0
            THEN 'pkl_rest_logprob is NaN where REST is known' END,
        CASE WHEN pkl_mass_high > 1 + 1e-5 OR (NOT $drawn AND pkl_mass_low < 1 - 1e-5)
            THEN 'pkl_logprob and REST do not sum to 1' END
    ]) AS rule
FROM built
