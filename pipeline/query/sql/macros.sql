-- Functions of ids and texts, for views and for whoever asks.

-- A sample is a document or a window of one: document id, '#', number. Of a conversation it is 0, or the index of the
-- one message that is taught; an answer of the teacher's own has a number too: '#2.0'.
CREATE MACRO document_of(sample_id) AS regexp_replace(sample_id, '#[0-9]+([.][0-9]+)?$', '');
CREATE MACRO window_of(sample_id) AS try_cast(regexp_extract(sample_id, '#([0-9]+)([.][0-9]+)?$', 1) AS INTEGER);

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

-- How much each of a list of rising ends adds.
CREATE MACRO widths_of(ends) AS list_transform(list_zip(starts_of(ends), ends), lambda one: one[2] - one[1]);
CREATE MACRO running(counts) AS list_reduce(counts, lambda sums, one: list_append(sums, sums[-1] + one), [0]);
CREATE MACRO chosen(counts, which) AS list_transform(
    list_zip(counts, which), lambda one: CASE WHEN one[2] THEN one[1] ELSE 0 END
);

-- Tokens of each span, but for the first of a sample, which has no row where nothing stood before it (first_row is 1).
CREATE MACRO token_counts(first_row, token_ends) AS
    widths_of(list_prepend(first_row, list_transform(token_ends, lambda one: greatest(one, first_row))))[2:];
CREATE MACRO rows_of_span(tokens, learn, before) AS
    CASE WHEN learn THEN range(before, before + tokens) ELSE list_resize([]::BIGINT[], tokens) END;

-- The row of each token of a sample, from 0, null where it has none: tokens of taught spans have rows, in order. Plain
-- text is one taught span. Nothing else in SQL works out which tokens have rows.
CREATE MACRO row_of_token(first_row, token_ends, learn) AS list_concat(
    list_resize([]::BIGINT[], first_row),
    flatten(list_transform(
        list_zip(
            token_counts(first_row, token_ends),
            learn,
            running(chosen(token_counts(first_row, token_ends), learn))[:len(learn)]
        ),
        lambda one: rows_of_span(one[1], one[2], one[3])
    ))
);

-- Elements of a list by their numbers, from 0: null where a number is null. So one per row becomes one per token.
CREATE MACRO taken(list, numbers) AS list_transform(numbers, lambda one: list[one + 1]);
-- The token of each row, from the row of each token.
CREATE MACRO token_of_row(row) AS list_where(range(len(row)), list_transform(row, lambda one: one IS NOT NULL));

CREATE MACRO bits_per_byte_of(nats, bytes) AS nats / ln(2) / nullif(bytes, 0);
-- Of an imported capture a label's log-probability may be unknown: NaN there, -inf in targets.
CREATE MACRO finite(logprob) AS CASE WHEN isfinite(logprob) THEN logprob ELSE NULL END;
CREATE MACRO known(logprob) AS CASE WHEN isnan(logprob) THEN NULL ELSE logprob END;
