"""How the command line ends: outputs that cannot be made, errors that nobody expected, streams that fail."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from xtoken import cli
from xtoken.schemas.configs.artifacts import InspectConfig

RUNNER = CliRunner()
# Every verb with an output, up to its name; what they read is not there, so whatever is said is said before reading.
WRITES = {
    "precompute": ("precompute", "c", "--teacher", "t", "--out"),
    "precompute's log": ("precompute", "c", "--teacher", "t", "--out", "o", "--log"),
    "import": ("import", "distillkit", "d", "--tokenizer", "t", "--out"),
    "align": ("align", "c", "--student", "s", "--out"),
    "project": ("project", "--student", "s", "--teacher", "t", "--out"),
    "train": ("train", "t", "--student", "s", "--out"),
    "eval": ("eval", "m", "--text", "t", "--out"),
    "report": ("report", "r", "--out"),
    "query": ("query", "c", "FROM tokens", "--out"),
    "inspect": ("inspect", "c", "--html", "worst", "--out"),
    "share push": ("share", "push", "c"),
    "share pull": ("share", "pull", "c"),
    "share merge": ("share", "merge", "c,d"),
    "demo": ("demo", "--out"),
    "transplant": ("transplant", "m", "--tokenizer", "t", "--out"),
}


@pytest.mark.parametrize("verb", WRITES)
def test_an_output_that_cannot_be_made(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for out, said in (
        ("file/x", "file/x cannot be made (Not a directory)"),
        ("/proc/x/y", "/proc/x/y cannot be made"),
        ("x" * 300, "cannot be made (File name too long)"),
        ("/", "is the root of the filesystem"),
        ("", "an empty path"),
        ("~nobody-has-this-name/x", "no such home folder"),
        ("s3://", "names no bucket"),
    ):
        result = RUNNER.invoke(cli.app, [*WRITES[verb], out])
        assert result.exit_code == 2, result.output
        assert said in result.output
        assert len(result.output.splitlines()) == 1, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_this_names_all_verbs_that_write() -> None:
    groups = {"": typer.main.get_command(cli.app), "share ": typer.main.get_command(cli.share_app)}
    writing = {
        prefix + name
        for prefix, group in groups.items()
        for name, command in group.commands.items()  # type: ignore[attr-defined]
        if {"out", "destination"} & {one.name for one in command.params}
    }
    assert writing == {*WRITES} - {"precompute's log"}


class Defect:
    """Stands for a verb's work."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, _: object) -> dict[str, object]:
        raise self.error


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_what_nobody_expected_is_one_line(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("xtoken.pipeline.store.inspect.inspect", Defect(KeyError("why")))
    result = RUNNER.invoke(cli.app, ["inspect", "x", *words])
    assert result.exit_code == 1
    (file,) = tmp_path.iterdir()
    line = f"unforeseen KeyError: 'why'; the full text is in {file}, please report it"
    assert result.stderr == f"error: {line}\n"
    assert result.stdout == (json.dumps({"error": line, "kind": "Unforeseen"}) + "\n" if words else "")
    assert "Traceback" in file.read_text()


def test_what_the_system_refuses_is_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Defect(PermissionError(13, "Permission denied", "/some/file"))
    monkeypatch.setattr("xtoken.pipeline.store.inspect.inspect", refused)
    result = RUNNER.invoke(cli.app, ["inspect", "x"])
    assert (result.exit_code, result.stderr) == (2, "error: /some/file: Permission denied; check its path and rights\n")


def test_developers_see_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOKEN_TRACEBACK", "1")
    monkeypatch.setattr("xtoken.pipeline.store.inspect.inspect", Defect(KeyError("why")))
    assert isinstance(RUNNER.invoke(cli.app, ["inspect", "x"]).exception, KeyError)


def test_every_word_of_every_argument_says_something() -> None:
    for words in (["inspect", ""], ["verify", " "], ["status", ""], ["report", "a", ""], ["eval", "", "--text", "x"]):
        result = RUNNER.invoke(cli.app, words)
        assert (result.exit_code, "an empty path" in result.output) == (2, True), result.output
    assert InspectConfig(path="x", html="worst").out is None


def xtoken(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """A command of the shell, in which $X is xtoken."""
    x = f"{sys.executable} {Path(cli.__file__)}"
    given = {**os.environ, "X": x, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=given, capture_output=True, check=False)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("$X losses --json >&-", 0, b""),
        ("set -o pipefail; $X losses --json | true", 0, b""),
        ("$X losses > /dev/full", 2, b"standard output cannot be written"),
        ("$X verify nowhere <&- >&- 2>&-", 2, b""),
        ("mkdir gone; cd gone; rmdir ../gone; $X inspect /nowhere", 2, b"the working folder is gone"),
        ("$X --help >&-; PYTHONIOENCODING=ascii $X train --help", 0, b""),
    ],
)
def test_streams_and_folders_that_fail(command: str, code: int, said: bytes, tmp_path: Path) -> None:
    done = xtoken(command, tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_home_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    command = "$X project --student bytes --teacher bytes --out w --json && ls w"
    done = xtoken(command, tmp_path, HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path / "tmp"), XDG_CACHE_HOME="")
    assert done.returncode == 0, done.stderr
    assert b"coverage.html" in done.stdout
    assert done.stderr.count(b"note: ") == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_eval_does_not_write_over_the_text_that_it_reads(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a b"}\n')
    result = RUNNER.invoke(cli.app, ["eval", "m", "--text", str(text), "--out", str(text)])
    assert result.exit_code == 2
    assert "choose a place outside of it" in result.output
    assert text.read_text() == '{"text": "a b"}\n'
