"""examples/demo.py without its models: the commands it shows are commands that the command line takes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from xtoken import cli
from xtoken.pipeline.tokens import load_tokenizer

SCRIPT = Path(cli.__file__).resolve().parent / "examples" / "demo.py"
MEASURED = {"bits_per_byte": 1.2, "kl": 0.4, "top1_agreement": 0.6, "teacher_bits_per_byte": 1.0}
FIGURES = {
    "transplant": {},
    "precompute": {"tokens": 1000, "seconds": 10.0, "bytes_per_token": 20.0, "entries_per_row": 9.0},
    "align": {"share_of_1_1_chunks": 0.7},
    "train": {"model": "o/run/model", "steps": 3},
    "eval": MEASURED,
    "report": {"page": "o/report.html"},
}


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("xtoken_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CommandLine:
    """Stands for the processes that the demo starts: parses their words as the command line does, and runs nothing."""

    def __init__(self) -> None:
        self.verbs: list[str] = []
        self.outs: list[str] = []

    def __call__(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        assert command[:3] == [sys.executable, "-m", "xtoken"]
        verb, *words = command[3:]
        group: Any = typer.main.get_command(cli.app)
        context = group.commands[verb].make_context(verb, words)
        assert context.params["as_json"]
        self.verbs.append(verb)
        self.outs.append(str(context.params.get("out")))
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(FIGURES[verb]).encode())


def test_its_commands_are_commands(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, out = CommandLine(), str(tmp_path / "o")
    monkeypatch.setattr(demo.subprocess, "run", line)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", str(tmp_path), "--steps", "3", "--out", out, "--json"])
    demo.main()
    said = capsys.readouterr()
    captured = ["precompute", "align"] * 3
    trained = ["train", "eval", "eval"] * 2
    assert line.verbs == ["transplant", *captured, "eval", "eval", *trained, "report"]
    assert said.err.count("$ xtoken ") == len(line.verbs)
    runs = [path for path in line.outs if "/run-" in path]
    assert runs == [f"{out}/run-ce-3", f"{out}/run-byte-prefix-3"], "other --steps in the same --out are other runs"
    figures = json.loads(said.out)
    assert figures["tokens_per_second"] == 100.0
    original, *others = figures["held_out"]
    assert original == {"model": "the original", "same": 1.0, "other": 1.0}
    assert [row["model"] for row in others] == [
        "transplant, untrained",
        "trained on the text: CE",
        "distilled: byte-prefix and CE",
    ]
    assert all(row["other_kl"] == 0.4 for row in others)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--steps", "0"], "--steps: 0 is no number of steps"), (["--out", ""], "--out: an empty path")],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    with pytest.raises(SystemExit, match="2"):
        demo.arguments()
    assert said in capsys.readouterr().err


def test_a_tokenizer_that_was_half_written_is_written_again(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    assert load_tokenizer(demo.train_tokenizer(tmp_path / "half")).table.size == demo.VOCABULARY


def test_its_tokenizer_is_the_same_each_time(demo: ModuleType, tmp_path: Path) -> None:
    first, second = (Path(demo.train_tokenizer(tmp_path / name)) / "tokenizer.json" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    table = load_tokenizer(str(first.parent)).table
    assert (table.size, table.info.eos_id) == (demo.VOCABULARY, 0)


def test_a_model_that_is_not_prepared_is_named(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit, match=r"smollm2-135m does not exist: 'make demo' prepares it"):
        demo.main()
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_ends_it_with_its_exit_code(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 4, stdout=b"{}")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "/t", "--out", str(tmp_path / "o"), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 4
