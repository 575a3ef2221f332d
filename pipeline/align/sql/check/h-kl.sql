-- H-KL: hkl_mass is what a chunk's common and other entries add up to; $student: tokens of the student's vocabulary.
SELECT
    sample_id,
    unnest([
        CASE WHEN hkl_common_ids_low < 0 OR hkl_common_ids_high >= $student
            THEN 'hkl_common_ids has an id outside the student''s vocabulary' END,
        CASE WHEN hkl_common_count_low < 0 OR hkl_other_count_low < 0 THEN 'a count of H-KL is negative' END,
        CASE WHEN hkl_mass_high > 1 + 1e-5 THEN 'hkl_common_logprob and hkl_other_logprob sum to more than 1' END
    ]) AS rule
FROM built
