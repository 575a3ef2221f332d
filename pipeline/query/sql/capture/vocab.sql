-- One row per token of the teacher's vocabulary.
-- token_id: its id
-- bytes: its bytes; none for specials
-- token: its bytes as text, what is not UTF-8 written like \xe6
-- role: bos, eos, eot, pad, unk, special, hole; null for text
-- byte_fallback: it is a <0xHH> byte token
-- category: numerals_1, numerals_2, numerals_3, whitespace, operators, latin, other_scripts, other_text, partial_utf8, specials; null for a hole
-- code: what stands for it in the capture's files
SELECT v.token_id, v.bytes, v.token, v.role, v.byte_fallback, c.category, v.code
FROM capture._vocabulary AS v JOIN capture._categories AS c USING (token_id)
