-- One row per student token.
-- sample_id: the sample
-- pos: number of the token in its sample, from 0
-- student_id: the token
-- bytes: its bytes in the vocabulary; none for specials
-- token: its bytes as text, what is not UTF-8 written like \xe6
-- start_byte: where it starts in the sample's text
-- end_byte: where it ends
-- chunk: the chunk it is in; null behind the last one
-- learn: it is taught; true in plain text
SELECT
    sample_id, pos, student_id, student_bytes_of(student_id) AS bytes, student_text_of(student_id) AS token,
    start_byte, end_byte, chunk, learn
FROM (
    SELECT
        sample_id,
        CAST(unnest(range(len(student_ids))) AS INTEGER) AS pos,
        unnest(student_ids) AS student_id,
        unnest(starts_of(student_end)) AS start_byte,
        unnest(student_end) AS end_byte,
        unnest(steps(chunk_student_end, CAST(len(student_ids) AS INTEGER))) AS chunk,
        unnest(coalesce(learn, list_resize([]::BOOLEAN[], len(student_ids), true))) AS learn
    FROM targets._stored
)
