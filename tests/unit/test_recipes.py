"""The recipes for GPUs: their flags are flags, their tasks are tasks, and a dry run downloads nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from xtoken import cli
from xtoken.examples.recipes.__main__ import check, commands, on_gpus, recipes

ROOT = Path(cli.__file__).resolve().parent


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_says_what_the_verbs_take(name: str) -> None:
    """Each goes from a corpus to figures of tasks, and what a verb reads an earlier one has written."""
    recipe = recipes()[name]
    written: set[str] = set()
    verbs = []
    for words in commands(recipe, "somewhere", 0.001):
        config = check(words)
        verbs.append(words[0])
        assert {word for word in words if word.startswith("somewhere")} - {getattr(config, "out", "")} <= {
            *written,
            *(f"{folder}/model" for folder in written),
        }
        written.add(getattr(config, "out", None) or "")
        if words[0] == "train":
            assert words[words.index("--steps") + 1] == str(round(recipe["steps"] / 1000))
            assert int(words[words.index("--step-tokens") + 1]) == recipe["cost"]["step_tokens"]
    assert verbs[0] == "precompute"
    assert verbs[-2:] == ["train", "eval"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "t", "--student", "s", "--out", "o", "--stepz", "3"], "--stepz"),
        (["train", "t", "--student", "s", "--out", "o", "--loss", "no-loss"], "no-loss"),
        (["eval", "m", "--tasks", "gsm8k,no-such-task"], "no task 'no-such-task'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(words: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        check(words)


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--dry-run"], "no folder to work in"), (["w", "--scale", "0"], "--scale 0"), (["w", "--gpus", "0"], "--gpus 0")],
)
def test_what_makes_no_run_is_refused(flags: list[str], said: str) -> None:
    words = [sys.executable, "-m", "examples.recipes", "llama-3.2-1b-from-qwen3-4b", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_several_gpus() -> None:
    assert on_gpus(["train", "t"], 8)[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8"]
    assert on_gpus(["precompute", "c"], 8)[-2:] == ["--workers", "8"]
    assert on_gpus(["align", "c"], 8) == ["-m", "xtoken", "align", "c"] == on_gpus(["align", "c"], 1)


def test_a_dry_run_prints_verbs_and_costs(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "examples.recipes", "llama-3.2-1b-from-qwen3-4b", str(tmp_path / "w"), "--dry-run"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "94,371,840,000 tokens" in done.stdout
    assert "Nothing was downloaded" in done.stdout
    assert done.stdout.count("-m xtoken") == 4
    assert not (tmp_path / "w").exists()
