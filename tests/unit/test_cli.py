"""The command line: frozen flags, help that teaches, exit codes."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from xtoken import cli

RUNNER = CliRunner()
VERBS = (
    *("align", "doctor", "eval", "import", "inspect", "losses"),
    *("precompute", "project", "query", "report", "status", "train", "transplant", "verify"),
)
SHARE_VERBS = ("card", "merge", "pull", "push")
REPLACED = ("demo", "estimate", "share verify")  # not listed; each names the command that does the same, and does it


def flags() -> dict[str, list[str]]:
    """Every verb with its arguments and options, as a user would type them."""
    groups = {"": typer.main.get_command(cli.app), "share ": typer.main.get_command(cli.share_app)}
    commands: dict[str, typer.core.TyperCommand] = {
        prefix + name: command
        for prefix, group in groups.items()
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        if name != "share"
    }
    return {name: sorted(p.opts[0] for p in command.params if p.name != "help") for name, command in commands.items()}


def test_flags_are_frozen(request: pytest.FixtureRequest) -> None:
    # A flag is a promise: adding one means adding it here, removing one breaks somebody's script.
    frozen = json.loads((request.path.parent / "flags.json").read_text())
    assert flags() == frozen


def test_help_lists_the_verbs_and_not_those_that_were_replaced() -> None:
    groups: dict[str, typer.core.TyperGroup] = {  # type: ignore[name-defined]
        "": typer.main.get_command(cli.app),  # type: ignore[dict-item]
        "share ": typer.main.get_command(cli.share_app),  # type: ignore[dict-item]
    }
    hidden = {prefix + name: one.hidden for prefix, group in groups.items() for name, one in group.commands.items()}
    assert {name for name, is_hidden in hidden.items() if is_hidden} == {*REPLACED}
    assert {name for name, is_hidden in hidden.items() if not is_hidden} - {"share"} == {
        *VERBS,
        *(f"share {name}" for name in SHARE_VERBS),
    }


def test_a_replaced_verb_says_the_same_command_and_does_it(request: pytest.FixtureRequest) -> None:
    capture = str(request.path.parents[1] / "golden" / "captures" / "v4-topk")
    old = RUNNER.invoke(cli.app, ["share", "verify", capture, "--audit", "--json"])
    line = f"note: 'xtoken share verify' will be gone in 0.7.0; the same is: xtoken verify {capture} --audit\n"
    assert (old.exit_code, old.stderr) == (0, line)
    assert old.stdout == RUNNER.invoke(cli.app, ["verify", capture, "--audit", "--json"]).stdout


def test_the_demo_goes_on_as_a_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = RUNNER.invoke(cli.app, ["demo", "--out", str(tmp_path / "o"), "--steps", "7", "--model", "/nowhere"])
    assert result.exit_code == 2
    assert f"examples/demo.py --out {tmp_path}/o --model /nowhere --steps 7\n" in result.stderr
    assert "the demo ended with exit code" in result.stderr
    assert "/nowhere" in capfd.readouterr().err


def test_what_makes_a_configuration_can_be_said_in_words() -> None:
    """Arguments without names, lists of them, switches, and flags whose name is not their field's."""
    from xtoken.schemas.configs.artifacts import AlignConfig
    from xtoken.schemas.configs.capture import PrecomputeConfig
    from xtoken.schemas.configs.measure import ReportConfig
    from xtoken.schemas.ui.flags import build, words_of

    runs = build(ReportConfig, {"runs": ["a b", "c"], "out": "r.html"})
    align = build(AlignConfig, {"captures": "x,y", "student": "s", "out": "t", "losses": "p-kl,h-kl"})
    plan = build(PrecomputeConfig, {"corpus": "c", "teacher": "t", "text": False, "dry_run": True, "split": "test"})
    assert words_of(runs) == ["a b", "c", "--out", "r.html"]
    assert words_of(align) == ["x,y", "--student", "s", "--out", "t", "--for", "p-kl,h-kl"]
    assert words_of(plan) == ["c", "--split", "test", "--teacher", "t", "--no-text", "--dry-run"]


@pytest.mark.parametrize("verb", [*VERBS, *(f"share {name}" for name in SHARE_VERBS), *REPLACED])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = RUNNER.invoke(cli.app, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example: xtoken {verb}" in " ".join(result.output.split())


def test_help_stands_in_panels_common_flags_first() -> None:
    """The first panel holds what most people give, the last what losses leave open."""
    shown = RUNNER.invoke(cli.app, ["train", "--help"]).output
    titles = re.findall(r"^╭─ ([A-Z][a-z ]+) ─", shown, re.M)
    groups = ["Student", "Data", "Loss", "Optimisation", "Checkpoints", "Report"]
    assert titles == ["Arguments", "Options", *groups, "Loss details"]
    first = shown[shown.index("╭─ Options") : shown.index("╭─ Student")]
    common = ("--student", "--out", "--loss", "--steps", "--lr", "--config", "--help")
    assert [flag for flag in common if flag not in first] == []
    assert "--alm-threshold" in shown[shown.index("╭─ Loss details") :]


def test_a_wrong_value_names_the_flag_and_the_choices() -> None:
    result = RUNNER.invoke(cli.app, ["align", "x", "--student", "y", "--out", "z", "--for", "p-kl,nonsense"])
    assert result.exit_code == 2
    assert "--for: loss 'nonsense' is unknown; choose from ce, p-kl, h-kl" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "t", "--student", "s", "--out", "o", "--weights", "1,x"], "--weights: "),
        (["train", "a,b", "--student", "s", "--out", "o", "--weights", "0,0"], "the teacher weights sum to 0"),
        (["train", "t", "--student", "s", "--out", "o", "--alm-threshold", "1"], "--alm-threshold: "),
        (["align", "c", "--student", "s", "--out", "o", "--tau", "0"], "--tau: "),
        (["align", "c", "--student", "s", "--out", "o", "--for", "uld", "--merge", "mean"], "leave uld out of --for"),
        (["project", "--student", "s", "--teacher", "t", "--out", "o", "--rule", "masked:verbs"], "masked:numerals"),
        (
            ["precompute", "c", "--teacher", "t", "--out", "o", "--codec", "sampled", "--temperatures", "2"],
            "at temperature 1 only",
        ),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--codec", "sampled", "--k", "8"], "--k 8 means nothing"),
        (
            ["precompute", "c", "--teacher", "t", "--out", "o", "--draws", "8"],
            "--draws 8 means nothing to --codec topk",
        ),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--cell", "9/8"], "write 1/8, 2/8, ... 8/8"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--cell", "0/8"], "write 1/8, 2/8, ... 8/8"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--ray", "ray://h:1"], "ray job submit"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--ray", "somewhere"], "say local, auto or HOST:PORT"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--gpus-per-worker", "1"], "say --ray too"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--gpu-price", "2"], "is for the cost under --dry-run"),
        (["precompute", "c", "--teacher", "t"], "--out is missing; name a folder or URL"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--pilot"], "--pilot is for --dry-run"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--like", "x"], "--like x is for --dry-run"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--pilot-tokens", "9"], "is for --dry-run; say that"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--tensor-parallel", "2"], "needs --backend vllm"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--log", "s3://b/l"], "name a local one"),
        (["precompute", "c", "--teacher", "a/t", "--teacher", "b/t", "--out", "o"], "would both go to the folder t"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--split", "held-out"], "--split: 'held-out' is none of"),
        (["precompute", "c", "--teacher", "t", "--out", "c/o"], "--out c/o lies inside c"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--log", "c/l"], "--log c/l lies inside c"),
        (["precompute", "c", "--teacher", "t", "--out", "./c/../c/o", "--dry-run"], "lies inside c"),
        (["align", "x", "--student", "s", "--corpus", "c", "--out", "c/o"], "--out c/o lies inside c"),
        (["train", "t", "--student", "s", "--eval-text", "c", "--out", "c/o"], "--out c/o lies inside c"),
        (["status", "o", "--watch", "0"], "--watch: "),
        (["share", "push", "a", "b", "--license", "corpus=mit"], "both are needed"),
        (["share", "push", "a", "b", "--license", "mit"], "write corpus=ID,outputs=ID"),
        (["share", "pull", "a", "b", "--parts", "1-"], "write it like 0-9,12"),
        (["share", "pull", "a", "b", "--columns", "kept"], "choose from text, rows, space_logprob"),
        (["share", "merge", "a", "b"], "one capture needs no merge"),
        (["precompute", "c", "--teacher", "t", "--out", "o", "--temperatures", "2,-1"], "a temperature of -1"),
    ],
)
def test_values_are_refused_before_anything_starts(words: list[str], said: str) -> None:
    result = RUNNER.invoke(cli.app, words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_held_out_text_is_of_one_split(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "boats"}\n')
    result = RUNNER.invoke(cli.app, ["eval", "no-model", "--tokenizer", "bytes", "--text", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds the splits test, train, and one is needed; name its file or folder" in result.output


def test_losses_lists_every_loss() -> None:
    from xtoken.schemas.losses import LOSSES

    rows = json.loads(RUNNER.invoke(cli.app, ["losses", "--json"]).stdout)["losses"]
    assert [row["loss"] for row in rows] == list(LOSSES)
    assert all(row["needs_stored"] and row["use_when"] for row in rows)
    plain = RUNNER.invoke(cli.app, ["losses"])
    assert plain.exit_code == 0
    assert "byte-prefix" in plain.stdout


def test_json_errors_are_json() -> None:
    result = RUNNER.invoke(cli.app, ["verify", "/does/not/exist", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["kind"] == "XtokenError"


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert RUNNER.invoke(cli.app, ["--version"]).stdout == f"xtoken {version('xtoken')}\n"
