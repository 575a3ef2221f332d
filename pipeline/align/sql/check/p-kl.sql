-- P-KL: pkl_mass is what each chunk's entries and REST add up to; $teacher: tokens of the teacher's vocabulary;
-- $drawn: rows are draws, of which what no cell holds is left out.
SELECT
    sample_id,
    unnest([
        CASE WHEN pkl_ids_low < 0 OR pkl_ids_high >= $teacher
            THEN 'pkl_ids has an id outside the teacher''s vocabulary' END,
        CASE WHEN list_min(pkl_count) < 0 THEN 'pkl_count is negative' END,
        CASE WHEN list_max(list_filter(pkl_rest_logprob, lambda v: NOT isnan(v))) > 1e-5
            THEN 'pkl_rest_logprob is no log-probability' END,
        CASE WHEN NOT $rest_unknown AND len(list_filter(pkl_rest_logprob, lambda v: isnan(v))) > 0
            THEN 'pkl_rest_logprob is NaN where REST is known' END,
        CASE WHEN list_max(pkl_mass) > 1 + 1e-5 OR (NOT $drawn AND list_min(pkl_mass) < 1 - 1e-5)
            THEN 'pkl_logprob and REST do not sum to 1' END
    ]) AS rule
FROM built
