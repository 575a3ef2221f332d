"""Rounds on small models: the student writes, another model scores, the student learns, twice."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from xtoken import cli, open_capture

pytestmark = pytest.mark.engine
ROOT = Path(cli.__file__).resolve().parent
TEMPLATE = ROOT / "tests" / "golden" / "captures" / "zephyr.jinja"
PROMPTS = ["Name three colours.", "How many legs has a spider?"]


def test_two_rounds(smollm2_dir: Path, gemma3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = importlib.import_module("xtoken.examples.rounds")
    verbs: list[str] = []

    def run(*words: Any) -> None:  # in this process, which has all libraries in memory
        verbs.append(str(words[0]))
        result = CliRunner().invoke(cli.app, [*map(str, words), "--quiet"])
        assert result.exit_code == 0, result.output

    monkeypatch.setattr(rounds, "run", run)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": one}]}) for one in PROMPTS))
    words = [
        str(prompts),
        "--student",
        str(smollm2_dir),
        "--teacher",
        str(gemma3_dir),
        "--out",
        str(tmp_path / "rounds"),
    ]
    words += ["--teacher-template", str(TEMPLATE), "--tokens", "8", "--samples", "2", "--max-tokens", "96"]
    words += ["--steps", "2", "--step-tokens", "64"]
    first, second = rounds.main(words)
    assert verbs == ["precompute", "precompute", "align", "train"] * 2
    for number, writer in ((1, str(smollm2_dir)), (2, str(first))):
        folder = tmp_path / "rounds" / f"round-{number}"
        written, scored = (open_capture(str(folder / name)) for name in ("written", "scored"))
        assert written.manifest["teacher"]["model"] == writer
        assert scored.manifest["teacher"]["model"] == str(gemma3_dir)
        answers = [sample.conversation["messages"][-1]["content"] for sample in written if sample.conversation]
        assert len(answers) == 4
        # the teacher scores what the student wrote, and nothing else
        for sample, answer in zip(scored, answers, strict=True):
            taught = [span for span in sample.spans if span.learn and span.kind == "assistant"]
            text = (sample.text or "").encode()
            assert b"".join(text[span.byte_start : span.byte_end] for span in taught).decode().strip() == answer.strip()
    weights = [path / "model.safetensors" for path in (smollm2_dir, first, second)]
    assert len({path.read_bytes() for path in weights}) == 3
    assert rounds.main(words) == [first, second]  # nothing is done again
