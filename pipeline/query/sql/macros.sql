-- Functions of ids and texts, for views and for whoever asks.

-- A sample is a document or a window of one: document id, '#', number.
CREATE MACRO document_of(sample_id) AS regexp_replace(sample_id, '#[0-9]+$', '');
CREATE MACRO window_of(sample_id) AS try_cast(regexp_extract(sample_id, '#([0-9]+)$', 1) AS INTEGER);

-- The document id up to its last '/', so that ids like book/language/page group by book and language; an id without one
-- up to its first '#' or ':', as in corpus.jsonl:12.
CREATE MACRO source_of(sample_id) AS
    CASE WHEN contains(document_of(sample_id), '/')
         THEN regexp_extract(document_of(sample_id), '(?s)^(.*)/', 1)
         ELSE regexp_extract(document_of(sample_id), '(?s)^[^#:]*')
    END;

CREATE MACRO letters_in(text, all_others) AS length(regexp_replace(text, all_others, '', 'g'));

-- Of Japanese, Han counts as Kana where a tenth of it is Kana.
CREATE MACRO with_han(kana, han) AS CASE WHEN 10 * kana >= han THEN kana + han ELSE kana END;

-- The writing system that most letters of a text are of; 'other' without any letter of these (of equal counts the last
-- name in the alphabet is taken, and lower case follows upper case).
CREATE MACRO script_of(text) AS CASE WHEN text IS NULL THEN NULL ELSE list_max([
    {'letters': letters_in(text, '[^\p{Latin}]+'), 'script': 'Latin'},
    {'letters': letters_in(text, '[^\p{Cyrillic}]+'), 'script': 'Cyrillic'},
    {'letters': letters_in(text, '[^\p{Greek}]+'), 'script': 'Greek'},
    {'letters': letters_in(text, '[^\p{Armenian}]+'), 'script': 'Armenian'},
    {'letters': letters_in(text, '[^\p{Georgian}]+'), 'script': 'Georgian'},
    {'letters': letters_in(text, '[^\p{Hebrew}]+'), 'script': 'Hebrew'},
    {'letters': letters_in(text, '[^\p{Arabic}]+'), 'script': 'Arabic'},
    {'letters': letters_in(text, '[^\p{Devanagari}]+'), 'script': 'Devanagari'},
    {'letters': letters_in(text, '[^\p{Bengali}]+'), 'script': 'Bengali'},
    {'letters': letters_in(text, '[^\p{Tamil}]+'), 'script': 'Tamil'},
    {'letters': letters_in(text, '[^\p{Telugu}]+'), 'script': 'Telugu'},
    {'letters': letters_in(text, '[^\p{Thai}]+'), 'script': 'Thai'},
    {'letters': letters_in(text, '[^\p{Hangul}]+'), 'script': 'Hangul'},
    {'letters': letters_in(text, '[^\p{Han}]+'), 'script': 'Han'},
    {'letters': with_han(letters_in(text, '[^\p{Hiragana}\p{Katakana}]+'), letters_in(text, '[^\p{Han}]+')),
     'script': 'Kana'},
    {'letters': 0, 'script': 'other'}
]).script END;

-- What stood before each element of a list of ends: where each begins.
CREATE MACRO starts_of(ends) AS CASE WHEN len(ends) = 0 THEN ends ELSE list_prepend(0, ends[:len(ends) - 1]) END;

-- A list with one element per row, as one with an element per token.
CREATE MACRO by_token(per_row, first_row) AS CASE WHEN first_row = 1 THEN list_prepend(NULL, per_row) ELSE per_row END;

CREATE MACRO bits_per_byte_of(nats, bytes) AS nats / ln(2) / nullif(bytes, 0);
CREATE MACRO known(logprob) AS CASE WHEN isnan(logprob) THEN NULL ELSE logprob END;
