"""From a trace to a capture and targets, with answers that were drawn from the rows that the trace holds."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.unit.pipeline.imports.sets import GOLDEN, SIZE, TEXTS, TINY, drawn_rows
from xtoken.pipeline.align.run import align
from xtoken.pipeline.imports.run import import_dataset
from xtoken.pipeline.query.samples import Capture
from xtoken.pipeline.store.reader import iter_targets
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

TEMPLATES = GOLDEN / "captures"
LISTED, KEPT = 20, 12
ROUNDED = 2e-5  # relative, of 16 significant bits
VLLM = {"kv_transfer_params": None}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    shutil.copytree(TINY, folder)
    shutil.copy(TEMPLATES / "zephyr.jinja", folder / "chat_template.jinja")
    return folder


def answer(tokenizer: Path, number: int, *, greedy: bool = False) -> tuple[list[dict[str, Any]], str]:
    """Rows as OpenAI's API writes them, and their text; greedy: every token is the most probable one."""
    table, rng = load_tokenizer(str(tokenizer)).table, np.random.default_rng(number)
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(TEXTS[number % len(TEXTS)] * (1 + number % 3)).ids
    logprob_TU = drawn_rows(ids, SIZE, rng)
    if greedy:
        best = logprob_TU.argmax(axis=1)
        for row, token in enumerate(ids):
            logprob_TU[row, [token, best[row]]] = logprob_TU[row, [best[row], token]]

    def entry(token: int, value: float) -> dict[str, Any]:
        data = [*table.token(token)] or None
        return {"token": "?", "logprob": float(value), "bytes": data}

    rows = []
    for row_U, token in zip(logprob_TU, ids, strict=True):
        top = np.argsort(-row_U, kind="stable")[:LISTED]
        rows.append(entry(token, row_U[token]) | {"top_logprobs": [entry(one, row_U[one]) for one in top.tolist()]})
    return rows, b"".join(map(table.token, ids)).decode()


def line(tokenizer: Path, number: int, *, greedy: bool = False, server: Any = None, **request: Any) -> dict[str, Any]:
    rows, text = answer(tokenizer, number, greedy=greedy)
    choice = {
        "message": {"content": text},
        "logprobs": {"content": rows},
        "finish_reason": ("stop", "length")[number % 2],
    }
    asked = {"messages": [{"role": "user", "content": f"Number {number}?"}], "temperature": 1, "top_p": 1} | request
    return {"request": asked, "response": {"choices": [choice], **(server or {})}}


def config(folder: Path, tokenizer: Path, lines: list[Any], **options: Any) -> ImportConfig:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), "utf-8")
    given = {"format": "api-trace", "paths": [str(path)], "tokenizer": str(tokenizer), "out": str(folder / "capture")}
    return ImportConfig.from_flat(**given, k=KEPT, min_p=0.0, part_bytes=1 << 16, **options)


@pytest.fixture(scope="module")
def lines(tokenizer: Path) -> list[dict[str, Any]]:
    """Ten answers, and two that cannot be imported."""
    other = line(tokenizer, 10, temperature=0.5)
    calls = line(tokenizer, 11)
    calls["response"]["choices"][0]["message"]["tool_calls"] = [{"id": "1"}]
    return [*(line(tokenizer, number) for number in range(10)), other, calls]


def test_a_trace_becomes_a_capture_and_targets(tokenizer: Path, lines: list[Any], tmp_path: Path) -> None:
    figures = import_dataset(config(tmp_path, tokenizer, lines), Silent())
    out = str(tmp_path / "capture")
    verify(out)
    assert (figures["format"], figures["form"], figures["tail_mass"]) == ("api-trace chat", "messages", "exact")
    assert (figures["samples"], figures["labels_unknown"]) == (10, 0)
    assert "alm" in figures["losses"]
    manifest = read_manifest(out, CaptureManifest)
    assert len(manifest.parts) > 2
    skipped = [json.loads(text) for text in (tmp_path / "capture" / "skipped.jsonl").read_text("utf-8").splitlines()]
    assert [(one["sample_id"], one["reason"]) for one in skipped] == [
        ("trace.jsonl:10.0", "a temperature other than 1"),
        ("trace.jsonl:11.0", "a tool call has no rows"),
    ]
    samples = list(Capture(out))
    assert [sample.sample_id for sample in samples] == [f"trace.jsonl:{at}.0#0" for at in range(10)]
    for sample, said in zip(samples, lines, strict=False):
        check_rows(sample, said["response"]["choices"][0])
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    given = {
        "captures": [out],
        "student": "bytes",
        "template": str(tmp_path / "plain.jinja"),
        "losses": ["alm", "p-kl"],
    }
    align(AlignConfig(**given, out=str(tmp_path / "targets")), Silent())
    verify(str(tmp_path / "targets"))
    rows = {row["sample_id"]: row for batch in iter_targets(str(tmp_path / "targets")) for row in batch.to_pylist()}
    for sample in samples:
        known = [value for value in rows[sample.sample_id]["teacher_logprob"] if not math.isnan(value)]
        assert sum(known) == pytest.approx(float(sample.label_logprob.sum()), rel=1e-3)


def test_only_an_answer_that_the_teacher_ended_teaches_its_end(
    tokenizer: Path, lines: list[Any], tmp_path: Path
) -> None:
    import_dataset(config(tmp_path, tokenizer, lines[:10]), Silent())
    out = str(tmp_path / "targets")
    align(AlignConfig(captures=[str(tmp_path / "capture")], student=str(tokenizer), out=out, losses=["alm"]), Silent())
    manifest = read_manifest(out, TargetManifest)
    assert manifest.chat is not None
    ended = []
    for batch in iter_targets(out):
        for row in batch.to_pylist():
            stops = [at for at, token in enumerate(row["student_ids"]) if token == manifest.chat.stop_token]
            ended.append(row["learn"][stops[-1]])
    assert ended == [True, False] * 5


def check_rows(sample: Any, choice: dict[str, Any]) -> None:
    """Labels are the source's, entries its first, and the tail what those leave."""
    content = choice["logprobs"]["content"]
    assert sample.complete is (choice["finish_reason"] == "stop")
    assert sample.conversation["messages"][-1]["content"] == choice["message"]["content"]
    np.testing.assert_allclose(sample.label_logprob, [row["logprob"] for row in content], rtol=ROUNDED)
    for row, said in enumerate(content):
        _, logprob, tail = sample.row(row)
        wanted = [one["logprob"] for one in said["top_logprobs"] if one["bytes"]][:KEPT]
        np.testing.assert_allclose(logprob, wanted, atol=0.02)  # steps of 1/32 nat
        assert tail == pytest.approx(math.log1p(-sum(map(math.exp, wanted))), abs=0.02)


def test_what_is_no_draw_from_its_rows_is_refused_unless_the_request_says_so(tokenizer: Path, tmp_path: Path) -> None:
    said = [line(tokenizer, number, greedy=True, server=VLLM, top_k=0) for number in range(12)]
    with pytest.raises(XtokenError, match=r"tokens of the text have rank .* ask the server at temperature 1"):
        import_dataset(config(tmp_path, tokenizer, said), Silent())
    for one in said:
        one["request"]["temperature"] = 0
    figures = import_dataset(config(tmp_path, tokenizer, said, dry_run=True), Silent())
    assert "test of calibration is left out" in figures["notes"][0]
    assert figures["calibration"][0]["share"] > 0.9


def test_rows_of_other_tokens_are_refused(tokenizer: Path, lines: list[Any], tmp_path: Path) -> None:
    late = json.loads(json.dumps(lines[:10]))
    for one in late:
        one["request"] |= {"temperature": 0.9}
        one["response"] |= VLLM
        content = one["response"]["choices"][0]["logprobs"]["content"]
        tops = [row["top_logprobs"] for row in content]
        for row, top in zip(content, [tops[-1], *tops], strict=False):
            row["top_logprobs"] = top
    with pytest.raises(XtokenError, match=r"predict the token -1 from where the format says"):
        import_dataset(config(tmp_path, tokenizer, late, dry_run=True), Silent())


def test_most_lines_may_be_of_no_use_without_blaming_the_tokenizer(
    tokenizer: Path, lines: list[Any], tmp_path: Path
) -> None:
    figures = import_dataset(config(tmp_path, tokenizer, [*lines[:10], *lines[10:] * 10], dry_run=True), Silent())
    assert figures["rows_looked_at"] > 100
    wrong = json.loads(json.dumps(lines[:10]))
    for one in wrong[:8]:
        one["response"]["choices"][0]["logprobs"]["content"][0]["bytes"] = [*b"no such token"]
    with pytest.raises(XtokenError, match=r"8 of the first 10 documents cannot be imported, .*; is --tokenizer that"):
        import_dataset(config(tmp_path, tokenizer, wrong, dry_run=True), Silent())
