-- What holds of targets of conversations beside check.sql. built: of summary_batch, a row per sample, with learn and
-- taught: which of the student's tokens, and of the teacher's, are taught. What has a teacher_logprob has a target.
WITH
-- Every chunk: how many tokens of either side it has, how many of them are not taught, and its bytes of the text.
chunk AS (
    SELECT
        sample_id,
        place,
        NOT isnan(teacher_logprob[place]) AS has_target,
        place = len(teacher_logprob) AS is_last,
        coalesce(chunk_student_end[place - 1], 0) AS s_start,
        coalesce(chunk_teacher_end[place - 1], 0) AS t_start,
        chunk_student_end[place] AS s_end,
        chunk_teacher_end[place] AS t_end,
        len(list_filter(learn[s_start + 1:s_end], lambda l: NOT l)) + len(list_filter(taught[t_start + 1:t_end], lambda l: NOT l))
            AS untaught,
        coalesce(teacher_end[t_end], 0) - coalesce(teacher_end[t_start], 0) AS bytes,
        len(student_ids) AS s_tokens,
        len(teacher_end) AS t_tokens
    FROM (SELECT *, unnest(range(1, len(teacher_logprob) + 1)) AS place FROM built)
),
-- Every sample: its chunks, and what the spans of the capture say of bytes.
sample AS (
    SELECT
        sample_id,
        bool_or(has_target AND untaught > 0) AS untaught,
        bool_or(s_end <= s_start AND t_end <= t_start) AS empty,
        bool_or(is_last AND (s_end <> s_tokens OR t_end <> t_tokens)) AS left_over,
        sum(bytes) FILTER (has_target) AS bytes
    FROM chunk
    GROUP BY sample_id
)
SELECT
    sample_id,
    unnest([
        CASE WHEN len(learn) <> len(student_ids) THEN 'learn has another length than its tokens' END,
        CASE WHEN untaught THEN 'a chunk with a target has a token that is not taught' END,
        CASE WHEN empty THEN 'a gap has no tokens' END,
        CASE WHEN left_over OR (len(teacher_logprob) = 0 AND len(student_ids) > 0)
            THEN 'chunks do not cover all tokens' END,
        CASE WHEN coalesce(sample.bytes, 0) + lost_bytes <> taught_bytes
            THEN 'taught bytes that both sides have are in no chunk, or in two' END,
        CASE WHEN in_gaps > 0 THEN 'a gap has entries of a target' END
    ]) AS rule
FROM built LEFT JOIN sample USING (sample_id)
