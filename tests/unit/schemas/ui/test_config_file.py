"""Settings from a file, and what a flag does to them."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.base import ROWS, Config, argument
from xtoken.schemas.configs.capture import EstimateConfig, PrecomputeConfig
from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.config_file import read_settings
from xtoken.schemas.ui.flags import build, command, config_option, options

RUNS = Path(__file__).resolve().parents[3] / "golden" / "runs"


PLACES = {"captures": "c", "student": "bytes", "out": "o"}


class Inner(Config):
    """A section."""

    size: int = Field(3, ge=1, description="How large.")
    near_to: list[str] = Field(default=["a"], description="Names.")


class Toy(Config):
    """A toy."""

    kind: str = Field(description="Kind.")
    path: str = argument("Where.")
    keep: int = Field(2, description="How many.", json_schema_extra=ROWS)
    rate: float | None = Field(None, description="How fast.")
    inner: Inner


def call(*words: str, repeat: str | None = None) -> Any:
    """The configuration that a command gets, or what it printed."""
    got: list[Any] = []

    def run(**values: Any) -> None:
        values.pop("config")
        got.append(values if repeat else build(Toy, values))

    app = typer.Typer()
    app.command()(command(run, [*options(Toy, repeat), config_option(Toy, repeat)], {}))
    result = CliRunner().invoke(app, words)
    return got[0] if got else result.output


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a file of settings; its path."""

    def file(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return file


FORMS = (
    "kind: k\npath: p\nsize: 5\nnear-to: [x, y]\nrate: 1e-3\nkeep: 4\n",
    "kind: k\npath: p\nkeep: 4\nrate: 0.001\ninner:\n  size: 5\n  near_to: x, y\n",
    "kind: k\npath: p\nrate: 0.001\nrows:\n  keep: 4\ninner: {size: 5, near-to: [x, y]}\n",
)


@pytest.mark.parametrize("text", FORMS)
def test_names_of_flags_or_fields_flat_or_in_sections(write: Any, text: str) -> None:
    expected = Toy.from_flat(kind="k", path="p", size=5, near_to=["x", "y"], rate=1e-3, keep=4)
    assert call("--config", write(text)) == expected


def test_flags_win(write: Any) -> None:
    path = write(FORMS[0])
    found = call("q", "--config", path, "--size", "3", "--near-to", "z")
    assert (found.path, found.inner.size, found.inner.near_to, found.kind) == ("q", 3, ["z"], "k")
    assert call("--config", path, "--keep", "2").keep == 2, "a flag that gives the default wins, too"
    assert "Missing" in call("--config", write("kind: k\n"))


def test_json_and_null(write: Any) -> None:
    path = write(json.dumps({"kind": "k", "path": "p", "size": 5, "keep": None}), "run.json")
    assert call("--config", path).to_flat() == {
        "kind": "k",
        "path": "p",
        "keep": 2,
        "rate": None,
        "size": 5,
        "near_to": ["a"],
    }


def test_a_flag_that_may_be_repeated_takes_a_list(write: Any) -> None:
    assert call("--config", write("kind: [a, b]\npath: p\n"), repeat="kind")["kind"] == ["a", "b"]
    assert call("--config", write("kind: a\npath: p\n"), repeat="kind")["kind"] == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sise: 3", "run.yaml: 'sise' is unknown; did you mean 'size'"),
        ("inner:\n  sise: 3", "'sise' is unknown; did you mean 'size'"),
        ("zzzzz: 3", "'zzzzz' is unknown; remove it, or use one of keep, kind, near-to"),
        ("outer:\n  size: 3", "'outer' is not a section; sections of this verb: inner, rows"),
        ("size: 0", r"size: Input should be greater than or equal to 1 \(it is 0\); .* give --size"),
        ("size: large", "size: Input should be a valid integer"),
        ("near-to: [[1]]", "near-to: "),
        ("size: 3\ninner: {size: 4}", "'size' is given twice"),
        ("near-to: a\nnear_to: b", "'near_to' is given twice"),
        ("size: 3\nsize: 4", "'size' is given twice"),
        ("- size", "expected names with values"),
        ("size: [", r"is neither YAML nor JSON \(line 1\)"),
        ("a: !!python/object:os.system {}", "unknown|not a section|neither YAML"),
        ("size: &a 3\nkeep: *a", "line 2 is an alias; write the value itself"),
        ("size: !!bool x", "line 1: the value does not fit its tag"),
        ("kind: !!timestamp x", "line 1: the value does not fit its tag"),
        ("kind: 2026-13-45", "line 1: the value does not fit its tag"),
        ("? [a, b]\n: 3", "line 1: a key is not a name"),
        ("kind: a\0b", "it holds a control character"),
        ("size: true", "size: expected a value, not true; .* give --size"),
        ("kind: 1234567", "kind: Input should be a valid string .*; quote it, mend it there"),
    ],
)
def test_what_is_refused(write: Any, text: str, said: str) -> None:
    with pytest.raises(XtokenError, match=said):
        read_settings(write(text), Toy)


def test_a_few_lines_that_stand_for_very_many_are_refused_at_once(write: Any) -> None:
    """Each level names the one below ten times."""
    laughs = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
    with pytest.raises(XtokenError, match="line 2 is an alias"):
        read_settings(write("a0: &a0 x\n" + laughs), Toy)


def test_sections_of_comments_titles_and_a_mark_at_the_start(write: Any) -> None:
    assert read_settings(write("inner:\n# size: 4\nkeep: 3"), Toy) == {"keep": 3}
    assert read_settings(write("Rows:\n  keep: 3"), Toy) == {"keep": 3}
    assert read_settings(write('\ufeff{"keep": 3}', "run.json"), Toy) == {"keep": 3}


def test_an_error_repeats_no_line_of_the_file(write: Any) -> None:
    for text, name in (("key: 'hunter2\n - x: [", "a.yaml"), ('{"key": "hunter2" "x"', "a.json"), ("hunter3: 1", "b")):
        with pytest.raises(XtokenError) as error:
            read_settings(write(text, name), Toy)
        assert "hunter2" not in str(error.value)


def test_files_that_are_none(tmp_path: Path, write: Any) -> None:
    with pytest.raises(XtokenError, match=r"it is a folder; give the run\.json in it"):
        read_settings(str(tmp_path), Toy)
    with pytest.raises(XtokenError, match="--config is empty; is a variable unset"):
        read_settings("", Toy)
    with pytest.raises(XtokenError, match="No such file"):
        read_settings(str(tmp_path / "none"), Toy)
    with pytest.raises(XtokenError, match="more than"):
        read_settings(write("#" * (2 << 20)), Toy)


def test_a_command_ends_with_the_reason(write: Any) -> None:
    assert "'sise' is unknown" in call("--config", write("sise: 3"))


@pytest.mark.parametrize("model", [PrecomputeConfig, EstimateConfig])
def test_a_section_is_named_like_its_group_or_like_its_panel(write: Any, model: type[Config]) -> None:
    for section in ("rows", "codec"):
        path = write(f"corpus:\n  corpus: c\n{section}:\n  k: 8\n  min-p: 0.1\nrun:\n  workers: 2")
        assert read_settings(path, model) == {"corpus": "c", "k": 8, "min_p": 0.1, "workers": 2}


def test_records_of_runs_are_readable() -> None:
    """As release 0.5.0 wrote them."""
    train = read_settings(str(RUNS / "run" / "run.json"), TrainConfig)
    config = build(TrainConfig, train)
    assert (config.out, config.optim.lr, config.data.seed, config.checkpoint.save_every) == ("run", 1e-3, 3, 2)
    recorded = json.loads((RUNS / "run" / "run.json").read_text())["config"]
    assert {name: value for name, value in config.record().items() if name in recorded} == recorded
    capture = read_settings(str(RUNS / "capture" / "run.json"), PrecomputeConfig)
    found = build(PrecomputeConfig, capture | {"corpus": "c", "out": "o"})
    teacher, codec = found.teacher, found.codec
    assert (teacher.teacher, teacher.backend, teacher.bos) == ("tiny", "fake", "never")
    assert (codec.k, codec.temperatures) == (8, [2.0])
    align = build(AlignConfig, read_settings(str(RUNS / "targets" / "align.json"), AlignConfig) | PLACES)
    assert (align.losses, align.entries, align.tau) == (["p-kl", "alm"], 6, 1.0)
