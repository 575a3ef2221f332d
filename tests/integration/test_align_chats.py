"""A real chat model's rows of conversations become targets for another family: capture, align, verify, figures."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess
from talks import TALKS

from xtoken.pipeline.align import run_captures
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.store.reader import iter_capture, iter_targets
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.manifest import TargetManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

NAMES = ["plain", "system", "thinking", "reasoning", "call", "hostile"]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
LOSSES = ["p-kl", "h-kl", "gold", "strict", "alm"]


@pytest.fixture(scope="module")
def capture(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("chats")
    rows: list[dict[str, Any]] = [{"id": name, "messages": TALKS[name]} for name in NAMES]
    rows[NAMES.index("call")]["tools"] = [TOOL]
    (root / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    given = {"id_field": "id", "date": "2026-07-04", "learn": ["thinking"]}
    places = {"corpus": str(root / "chats.jsonl"), "teacher": str(smollm2_dir), "out": str(root / "c")}
    precompute(PrecomputeConfig.from_flat(**places, **given), Silent(), executor=InProcess())
    return str(root / "c")


@pytest.mark.engine
@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_from_one_family_to_another(
    capture: str, name: str, tokenizer_file: Callable[[str], Path], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    out = str(tmp_path / "t")
    student = str(tokenizer_file(name).parent)
    config = AlignConfig(captures=[capture], student=student, out=out, losses=LOSSES)
    figures = run_captures(config, Silent())
    verify(out)
    manifest = read_manifest(out, TargetManifest)
    assert manifest.chat is not None
    rows = {row["sample_id"].partition("#")[0]: row for batch in iter_targets(out) for row in batch.to_pylist()}
    theirs = {row["sample_id"].partition("#")[0]: row for batch in iter_capture(capture) for row in batch.to_pylist()}
    assert rows.keys() == theirs.keys() == set(NAMES)
    # every log-probability of a taught token is in a chunk, where both templates write all that is taught
    for talk in ("plain", "system", "hostile"):
        known = [value for value in rows[talk]["teacher_logprob"] if not math.isnan(value)]
        assert sum(known) == pytest.approx(sum(theirs[talk]["realised_logprob"]), rel=1e-4)
        answers = "".join(one["content"] for one in TALKS[talk] if one["role"] == "assistant")
        learned = sum(theirs[talk]["span_learn"])
        assert learned == 2 * sum(one["role"] == "assistant" for one in TALKS[talk])
        assert len(answers.encode()) == sum(
            end - start
            for start, end, learn in zip(
                [0, *theirs[talk]["span_byte_end"]],
                theirs[talk]["span_byte_end"],
                theirs[talk]["span_learn"],
                strict=False,
            )
            if learn
        )
    # the last chunk with a target of an answer is its stop
    for row in (rows["plain"], rows["system"]):
        last = max(at for at, value in enumerate(row["teacher_logprob"]) if not math.isnan(value))
        assert row["student_ids"][row["chunk_student_end"][last] - 1] == manifest.chat.stop_token
    shown = figures["conversations"]
    figure(
        f"conversations of SmolLM2 for {name}: {shown['share_of_taught_bytes']:.1%} of taught bytes in chunks, "
        f"{shown['ce_only_tokens']} of {shown['learn_tokens']} taught tokens from the text alone, "
        + ", ".join(f"{count} {what}" for what, count in shown.items() if what.startswith("lost_"))
    )
    assert shown["share_of_taught_bytes"] > 0.7
