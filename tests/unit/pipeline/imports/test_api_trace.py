"""API traces as samples, with real tokenizers: what becomes text, a conversation, a row, or nothing."""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtoken.pipeline.chats import Conversation, Message, open_chat_model, open_ids_model
from xtoken.pipeline.imports.api_trace import ApiTraces, guess_form, open_reader
from xtoken.pipeline.imports.api_trace_tokens import TokenIds
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut
from xtoken.pipeline.tokens import TextTokenizer, TokenTable, load_tokenizer
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError

ASKED = [{"role": "user", "content": "What is it?"}]
TEXT = "It is naïve 🐳 鯨, or so."


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> TextTokenizer:
    return load_tokenizer(str(smollm2_dir))


def top(table: TokenTable, token: int, at: int) -> list[tuple[int, float]]:
    """A list of four tokens, the token itself in second place."""
    others = [one for one in (300 + at, 400 + at, 500 + at) if one != token]
    return [(others[0], -0.7), (token, -1.25), *((one, -3.0 - rank) for rank, one in enumerate(others[1:]))]


def entry(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": data.decode(errors="backslashreplace"), "logprob": logprob, "bytes": [*data]}


def content(table: TokenTable, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Rows as OpenAI's API writes them."""
    return [
        entry(table.token(token), -1.25)
        | {"top_logprobs": [entry(table.token(one), value) for one, value in top(table, token, at)]}
        for at, token in enumerate(ids)
    ]


def chosen(rows: list[dict[str, Any]], text: str, index: int = 0, **changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"index": index, "message": message, "logprobs": {"content": rows}, "finish_reason": "stop"} | changes


def exchange(*choices: dict[str, Any], **request: Any) -> dict[str, Any]:
    return {"request": {"messages": ASKED} | request, "response": {"created": 1_700_000_000, "choices": [*choices]}}


Open = Callable[..., ApiTraces]


@pytest.fixture
def traces(tmp_path: Path, smollm2_dir: Path) -> Open:
    def opened(
        *values: Any,
        tokenizer: Path = smollm2_dir,
        part_bytes: int = 1 << 26,
        form: str | None = None,
        **options: Any,
    ) -> ApiTraces:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
        given = {"format": "api-trace", "paths": [str(path)], "tokenizer": str(tokenizer), "out": str(tmp_path / "out")}
        config = ImportConfig.from_flat(**given, part_bytes=part_bytes, **options)
        return open_reader(config, Spelling(load_tokenizer(str(tokenizer))), form or guess_form(config) or "text")

    return opened


def all_of(reader: ApiTraces) -> list[ImportedSample | LeftOut]:
    return [found for part in reader.slices() for found in reader.read(part)]


def only(reader: ApiTraces) -> ImportedSample:
    (found,) = all_of(reader)
    assert isinstance(found, ImportedSample), found
    return found


def refused(reader: ApiTraces) -> LeftOut:
    (found,) = all_of(reader)
    assert isinstance(found, LeftOut)
    return found


def rows_of(sample: ImportedSample) -> list[list[tuple[int, float]]]:
    pairs = list(zip(sample.entry_ids.tolist(), sample.entry_logprob.tolist(), strict=True))
    return [pairs[start:end] for start, end in zip(sample.offsets[:-1], sample.offsets[1:], strict=True)]


def test_an_answer_is_a_conversation_with_its_tokens_taught(traces: Open, smollm2: TextTokenizer) -> None:
    ids = smollm2.token_ids([TEXT])[0]
    reader = traces(exchange(chosen(content(smollm2.table, ids), TEXT)))
    sample = only(reader)
    assert sample.chat is not None
    assert sample.conversation is not None
    assert sample.name == "a.jsonl:0.0"
    assert sample.ids[sample.chat.learn].tolist() == ids
    assert sample.ids.tolist() == sample.chat.ids.tolist()
    assert smollm2.token_ids(["assistant"])[0][0] in sample.ids[: -len(ids)].tolist()
    assert [(one.role, one.content) for one in sample.conversation.messages][-1] == ("assistant", TEXT)
    assert rows_of(sample) == [top(smollm2.table, token, at) for at, token in enumerate(ids)]
    assert (sample.label_logprob == -1.25).all()
    assert sample.label_rank is not None
    assert (sample.label_rank == 2).all()
    assert (sample.complete, sample.first_row, reader.shift) == (True, 1, 0)
    chat = reader.source.chat
    assert chat is not None
    assert chat.answering is not None
    assert (chat.date, chat.turns, chat.answering.temperature) == ("2025-01-01", "last", 1.0)
    assert (reader.source.format, reader.source.rest, reader.source.notes) == ("api-trace chat", "exact", ())


def test_every_choice_is_a_sample_and_a_cut_one_is_not_complete(traces: Open, smollm2: TextTokenizer) -> None:
    table, texts = smollm2.table, ["Yes.", "No, never", "Who knows?"]
    choices = [
        chosen(content(table, smollm2.token_ids([text])[0]), text, at, finish_reason=reason)
        for at, (text, reason) in enumerate(zip(texts, ("stop", "length", "stop"), strict=True))
    ]
    choices[2]["message"]["tool_calls"] = [{"id": "1"}]
    found = all_of(traces(exchange(*choices, n=3), {"request": {}, "response": {"error": {"code": 429}}}))
    assert [one.name if isinstance(one, ImportedSample) else (one.sample_id, one.reason) for one in found] == [
        "a.jsonl:0.0",
        "a.jsonl:0.1",
        ("a.jsonl:0.2", "a tool call has no rows"),
        ("a.jsonl:1.0", "an error of the server"),
    ]
    assert [one.complete for one in found[:2] if isinstance(one, ImportedSample)] == [True, False]


def as_vllm(table: TokenTable, ids: Sequence[int]) -> list[dict[str, Any]]:
    """The same as vLLM's server writes it: the sampled token first, bytes of what is decoded so far."""
    rows, held = [], b""
    for row, token in zip(content(table, ids), ids, strict=True):
        held += table.token(token)
        try:
            data, held = held.decode().encode(), b""
        except UnicodeDecodeError:
            data = b""
        tops = [row["top_logprobs"][1], row["top_logprobs"][0], *row["top_logprobs"][2:]]
        rows.append(entry(data, -1.25) | {"top_logprobs": [entry(data, -1.25), *tops[1:]]})
    return rows


@pytest.mark.parametrize("told", [False, True])
def test_parts_of_a_character_are_found_and_have_no_rows(traces: Open, smollm2: TextTokenizer, told: bool) -> None:
    ids = smollm2.token_ids([TEXT])[0]
    rows = as_vllm(smollm2.table, ids)
    parts = [at for at, row in enumerate(rows) if row["bytes"] == []]
    assert len(parts) == 4
    whole = [at for at in range(len(ids)) if at not in parts and at - 1 not in parts]
    choice = chosen(rows, TEXT) | ({"token_ids": ids} if told else {})
    sample = only(traces(exchange(choice)))
    assert sample.chat is not None
    assert sample.ids[sample.chat.learn].tolist() == ids
    found = rows_of(sample)
    assert [at for at, row in enumerate(found) if row] == whole
    assert found[whole[0]] == top(smollm2.table, ids[whole[0]], whole[0])
    assert (sample.label_logprob == -1.25).all()  # of parts, too: they add up over the chunk


def test_parts_that_the_tokenizer_would_write_otherwise_are_left_out(traces: Open, smollm2: TextTokenizer) -> None:
    ids = smollm2.token_ids([TEXT])[0]
    rows = as_vllm(smollm2.table, ids)
    at = next(at for at, row in enumerate(rows) if row["bytes"] == [])
    found = refused(traces(exchange(chosen(rows[:at] + rows[at + 1 :], TEXT))))
    assert found.reason == "parts of a character are not certain"
    assert "shows 2 tokens as" in found.detail
    assert "return_token_ids" in found.detail


def test_ids_in_the_names_of_tokens_are_taken(traces: Open, smollm2: TextTokenizer) -> None:
    ids = smollm2.token_ids([TEXT])[0]

    def named(token: int, logprob: float) -> dict[str, Any]:
        return entry(f"token_id:{token}".encode(), logprob)

    rows = [
        named(token, -1.25) | {"bytes": [], "top_logprobs": [named(*one) for one in top(smollm2.table, token, at)]}
        for at, token in enumerate(ids)
    ]
    sample = only(traces(exchange(chosen(rows, TEXT))))
    assert rows_of(sample) == [top(smollm2.table, token, at) for at, token in enumerate(ids)]


def test_a_stop_that_the_server_lists_has_a_row(traces: Open, smollm2: TextTokenizer) -> None:
    ids = smollm2.token_ids(["Yes."])[0]
    rows = content(smollm2.table, ids)
    stop = entry(b"<|im_end|>", -0.5)
    rows.append(stop | {"top_logprobs": [stop, entry(b" And", -1.5)]})
    sample = only(traces(exchange(chosen(rows, "Yes."))))
    assert sample.chat is not None
    assert (sample.ids[-1], sample.chat.spans[-1].kind) == (2, "stop")
    assert rows_of(sample)[-1] == [(2, -0.5), (smollm2.token_ids([" And"])[0][0], -1.5)]
    assert sample.label_logprob[-1] == -0.5


def test_what_has_no_token_goes_to_rest_but_not_in_the_text(traces: Open, smollm2: TextTokenizer) -> None:
    ids = smollm2.token_ids(["Yes."])[0]
    rows = content(smollm2.table, ids)
    rows[0]["top_logprobs"][0] = entry("no such token at all 鯨".encode(), -0.7)
    rows[0]["top_logprobs"][2] |= {"bytes": None}
    assert [len(row) for row in rows_of(only(traces(exchange(chosen(rows, "Yes.")))))] == [2, 4]
    rows[1] |= entry("no such token at all 鯨".encode(), -1.25)
    found = refused(traces(exchange(chosen(rows, "Yes."))))
    assert found.reason == "bytes of no token"
    assert "name the model's own tokenizer" in found.detail


def test_tokens_of_another_text_are_left_out(traces: Open, smollm2: TextTokenizer) -> None:
    rows = content(smollm2.table, smollm2.token_ids(["Yes."])[0])
    assert refused(traces(exchange(chosen(rows, "Never.")))).reason == "the tokens are another text"


def test_bytes_of_several_tokens_are_refused_by_name(smollm2_dir: Path) -> None:
    tokens = TokenIds(open_ids_model(str(smollm2_dir)))
    assert tokens.doubled == set()
    tokens.doubled.add(b"Yes")
    assert tokens.entry(b"Yes") is None
    with pytest.raises(XtokenError, match="bytes of several tokens: b'Yes' are those of more than one token; have"):
        tokens.answer([type("Row", (), {"token": b"Yes"})()])


def test_without_a_template_or_messages_answers_are_text(
    traces: Open, tokenizer_file: Callable[[str], Path], smollm2: TextTokenizer
) -> None:
    folder = tokenizer_file("gptoss").parent
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.token_ids([TEXT])[0]
    reader = traces(exchange(chosen(content(tokenizer.table, ids), TEXT)), tokenizer=folder)
    sample = only(reader)
    assert (sample.chat, sample.first_row, sample.ids.tolist()) == (None, 0, ids)
    assert "the tokenizer has no chat template" in reader.source.notes[0]
    own = smollm2.token_ids([TEXT])[0]
    alone = exchange(chosen(content(smollm2.table, own), TEXT))["response"]
    assert (only(traces(alone)).ids.tolist(), traces(alone).source.chat) == (own, None)


def scored(ids: Sequence[int], *, told: bool = True, **request: Any) -> dict[str, Any]:
    """As vLLM writes it: the prompt's own token first."""
    rows: list[Any] = [None]
    for at, token in enumerate(ids[1:], start=1):
        rows.append({str(token): {"logprob": -8.0, "rank": 77}, str(900 + at): {"logprob": -0.25, "rank": 1}})
    choice = {"prompt_logprobs": rows, "prompt_token_ids": [*ids] if told else None}
    return {"request": request, "response": {"choices": [choice]}}


@pytest.mark.parametrize("told", [True, False])
def test_a_scored_text_loses_its_bos_and_keeps_its_first_token(
    traces: Open, tokenizer_file: Callable[[str], Path], told: bool
) -> None:
    folder = tokenizer_file("llama3").parent
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.token_ids([TEXT])[0]
    bos = tokenizer.table.info.bos_id
    assert bos is not None
    with_bos = only(traces(scored([bos, *ids], told=told, prompt=TEXT), tokenizer=folder))
    assert (with_bos.ids.tolist(), with_bos.first_row, len(with_bos.label_logprob)) == (ids, 0, len(ids))
    twice = only(traces(scored([bos, bos, *ids], told=told, prompt=TEXT), tokenizer=folder))
    assert (twice.ids.tolist(), twice.first_row, len(twice.label_logprob)) == (ids, 0, len(ids))
    without = only(traces(scored(ids, told=told, prompt=TEXT), tokenizer=folder))
    assert (without.ids.tolist(), without.first_row, len(without.label_logprob)) == (ids, 1, len(ids) - 1)
    assert rows_of(without)[0] == [(901, -0.25)]  # the text's token is outside the top 1
    assert (without.label_logprob == -8.0).all()
    assert without.label_rank is not None
    assert (without.label_rank == 77).all()


def test_a_scored_conversation_is_taught_where_the_assistant_speaks(traces: Open, smollm2_dir: Path) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "A whale."}]
    model = open_chat_model(str(smollm2_dir), date=datetime(1970, 1, 1))
    tokens = model.encode(Conversation((Message("user", "What is it?"), Message("assistant", "A whale."))))
    asks = model.encode_prompt(Conversation((Message("user", "x"),))).ids[-3:].tolist()
    sample = only(traces(scored([*tokens.ids.tolist(), *asks], messages=messages)))
    assert sample.chat is not None
    assert sample.ids.tolist() == tokens.ids.tolist()
    assert rows_of(sample) == [[(900 + at, -0.25)] for at in np.flatnonzero(tokens.learn).tolist()]
    other = refused(traces(scored([5, *tokens.ids.tolist()], messages=messages)))
    assert other.reason == "another rendering"
    assert "from token 0 on" in other.detail


def test_another_kind_of_line_is_left_out(traces: Open, smollm2: TextTokenizer) -> None:
    ids = smollm2.token_ids([TEXT])[0]
    chat = exchange(chosen(content(smollm2.table, ids), TEXT))
    found = all_of(traces(chat, scored(ids)))
    assert isinstance(found[1], LeftOut)
    assert (found[1].sample_id, found[1].reason) == ("a.jsonl:1.0", "another kind of trace")


def test_parts_of_a_file_give_what_the_whole_does(traces: Open, smollm2: TextTokenizer) -> None:
    words = ["Yes.", "No.", "Who knows?", TEXT] * 40
    values = [exchange(chosen(content(smollm2.table, smollm2.token_ids([text])[0]), text)) for text in words]
    whole = all_of(traces(*values))
    reader = traces(*values, part_bytes=1 << 16)
    parts = reader.slices()
    assert len(parts) > 3
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    again = [one for part in reversed(parts) for one in reversed(list(reader.read(part)))][::-1]
    assert [vars(one)["name"] for one in again] == [f"a.jsonl:{at}.0" for at in range(160)]
    for one, two in zip(again, whole, strict=True):
        assert isinstance(one, ImportedSample)
        assert isinstance(two, ImportedSample)
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.entry_ids, two.entry_ids)


def test_a_damaged_line_ends_the_import_with_its_place(traces: Open, smollm2: TextTokenizer) -> None:
    good = exchange(chosen(content(smollm2.table, smollm2.token_ids(["Yes."])[0]), "Yes."))
    bad = json.loads(json.dumps(good))
    bad["response"]["choices"][0]["logprobs"]["content"][1]["top_logprobs"][3]["logprob"] = 3
    reader = traces(good, bad)
    with pytest.raises(XtokenError) as caught:
        all_of(reader)
    assert str(caught.value).startswith(
        "a.jsonl, line 2: choices[0].logprobs.content[1].top_logprobs[3].logprob is 3, but a log-probability is at "
        "most 0; write"
    )


def test_damaged_lines_can_be_skipped(traces: Open, smollm2: TextTokenizer) -> None:
    good = exchange(chosen(content(smollm2.table, smollm2.token_ids(["Yes."])[0]), "Yes."))
    bad = exchange(good["response"]["choices"][0], chosen([{}], "No."))
    found = all_of(traces(good, bad, good, on_bad="skip"))
    assert [one.name if isinstance(one, ImportedSample) else one.reason for one in found] == [
        "a.jsonl:0.0",
        "a damaged line",  # nothing of it is kept
        "a.jsonl:2.0",
    ]


def test_ids_keep_control_tokens_apart_and_long_ones_are_cut(traces: Open, smollm2: TextTokenizer) -> None:
    ids = [1, *smollm2.token_ids(["user\nIt is"])[0], 2, *smollm2.token_ids(["\nnaïve 🐳"])[0]]
    sample = only(traces(scored([0, *ids]), form="ids"))
    assert sample.chat is not None
    assert sample.chat.text == "user\nIt is\nnaïve 🐳"
    assert (sample.ids.tolist(), sample.first_row) == ([0, *ids], 1)
    taught = np.flatnonzero(sample.chat.learn).tolist()
    assert rows_of(sample) == [[(900 + at, -0.25)] for at in taught]
    assert len(taught) > 8
    cut = only(traces(scored(ids[1:], prompt="x"), form="text", max_tokens=len(ids) - 3))
    whole = smollm2.table.token(int(cut.ids[-1]))
    assert (len(cut.ids), cut.complete, whole) == (len(ids) - 4, False, "ïve".encode())  # not within the whale
    long = refused(traces(exchange(chosen(content(smollm2.table, ids[1:4]), "user\nIt")), max_tokens=8))
    assert long.reason == "longer than --max-tokens"


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ({}, True),
        ({"temperature": 1, "top_p": 1.0}, True),
        ({"top_p": 0.9}, False),
        ({"top_k": 20}, False),
        ({"temperature": 0}, False),
    ],
)
def test_answers_that_were_drawn_otherwise_are_not_calibrated(
    traces: Open, smollm2: TextTokenizer, asked: dict[str, Any], drawn: bool
) -> None:
    plain = exchange(chosen(content(smollm2.table, smollm2.token_ids(["Yes."])[0]), "Yes."))
    other = {"request": plain["request"] | asked, "response": plain["response"]}
    reader = traces(plain, other)
    assert reader.source.calibrated is drawn
    assert ("test of calibration is left out" in "".join(reader.source.notes)) is not drawn
    vllm = {**plain, "response": plain["response"] | {"kv_transfer_params": None}}
    asked = {"temperature": 1, "top_p": 1, "top_k": -1}
    assert traces({**vllm, "request": vllm["request"] | asked}).source.calibrated
    assert not traces(vllm).source.calibrated  # its defaults are the model's


def test_messages_need_a_template(traces: Open, tokenizer_file: Callable[[str], Path]) -> None:
    with pytest.raises(XtokenError, match=r"conversations need a chat template, and .* has none; name"):
        traces(exchange(chosen(one_row(), "x")), tokenizer=tokenizer_file("gptoss").parent, form="messages")


def one_row() -> list[dict[str, Any]]:
    return [entry(b"x", -0.1) | {"top_logprobs": [entry(b"x", -0.1)]}]


def test_what_is_no_trace_is_refused_before_work(traces: Open, tmp_path: Path, smollm2_dir: Path) -> None:
    with pytest.raises(XtokenError, match="holds no line that can be read; name the files of the trace"):
        traces()
    with pytest.raises(XtokenError, match=r"line 1: the response is .*, but it must have choices"):
        all_of(traces({"text": "a"}))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl").write_text("{}", "utf-8")

    def asked(*paths: str) -> ImportConfig:
        given = {"format": "api-trace", "tokenizer": str(smollm2_dir), "out": str(tmp_path / "out")}
        return ImportConfig.from_flat(**given, paths=[str(tmp_path / path) for path in paths])

    spelling = Spelling(load_tokenizer(str(smollm2_dir)))
    for paths, message in (
        (["none.jsonl"], "none.jsonl does not exist; give files or folders"),
        (["out"], "out does not exist"),
        (["a.jsonl", "more"], "two files are named 'a.jsonl'"),
    ):
        with pytest.raises(XtokenError, match=message):
            open_reader(asked(*paths), spelling, "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(XtokenError, match=r"holds no file that ends in .jsonl"):
        open_reader(asked("empty"), spelling, "text")
