"""Paths as users give them: plain for every verb, or refused before anything is read or written."""

import importlib
import os
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas import configs
from xtoken.schemas.configs.artifacts import AlignConfig, QueryConfig
from xtoken.schemas.configs.base import Config, place_of
from xtoken.schemas.configs.capture import CorpusConfig, PrecomputeConfig
from xtoken.schemas.configs.measure import ReportConfig
from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.paths import is_chain, plain, refuse_lost_folder, refuse_unusable
from xtoken.schemas.io.remote import is_local, open_filesystem
from xtoken.schemas.ui.flags import build

_SOUNDS_LIKE_ONE = re.compile(
    r"folder|\bfile\b|\bURL\b|corpus|\bcapture\b|targets|tokenizer|teacher;|student;|page\b", re.I
)
# They speak of such things and hold something else.
_HOLD_OTHERS = {
    "split",
    "text_field",
    "id_field",
    "eval_id_field",
    "text",
    "batching",
    "html",
    "losses",
    "loss",
    "sql",
    "weights",
}
_HOLD_OTHERS |= {"rule", "on_bad", "merge", "title", "license", "prefix", "columns", "parts", "where", "bos", "debias"}
_HOLD_OTHERS |= {"backend", "wandb", "tasks", "ray", "cell", "revision", "audit", "date"}


def every_config() -> list[type[Config]]:
    """The configurations of all verbs."""
    for module in pkgutil.iter_modules(configs.__path__, "xtoken.schemas.configs."):
        importlib.import_module(module.name)
    found: list[type[Config]] = []
    waiting: list[type[Config]] = [Config]
    while waiting:
        waiting += (below := waiting.pop().__subclasses__())
        found += below
    return [one for one in found if one.__module__.startswith("xtoken.schemas.")]


def test_every_field_that_holds_a_path_says_so() -> None:
    """What is not marked is neither expanded nor refused when it is empty."""
    forgotten = []
    for config in every_config():
        for name, field in config.model_fields.items():
            holds_text = field.annotation in (str, list[str], str | None)
            if holds_text and place_of(field) is None and _SOUNDS_LIKE_ONE.search(field.description or ""):
                forgotten += [f"{config.__name__}.{name}"] * (name not in _HOLD_OTHERS or name == "out")
    assert forgotten == []
    assert {place_of(one.model_fields["out"]) for one in every_config() if "out" in one.model_fields} == {
        "folder",
        "file",
        "page",
    }


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("file://~/x", "HOME/x"),
        ("file:///a/b", "/a/b"),
        ("file://localhost/a", "/a"),
        ("file:a", "a"),
        ("local://a/b", "a/b"),
        ("acme/model", "acme/model"),
        ("a/~b", "a/~b"),
        ("a::b", "a::b"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("zip:///inner::a.zip", "zip:///inner::a.zip"),
        ("memory:///x", "memory:///x"),
    ],
)
def test_places_are_made_plain(given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plain(given) == meant.replace("HOME", str(tmp_path))


def test_a_name_that_starts_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pathlib makes ~x of ./~x."""
    monkeypatch.chdir(tmp_path)
    for given in ("./~b/c", ".//~b/./c"):
        assert plain(given) == str(tmp_path / "~b" / "c")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "empty path"),
        (" \t ", "empty path"),
        ("file://", "empty path"),
        ("a\nb", "control character"),
        ("a\0", "control character"),
        ("~nobody-has-this-name/x", "no such home folder"),
        ("s3://", "no bucket"),
        ("s3:///capture", "no bucket"),
        ("s3:/bucket/x", r"write s3://\.\.\."),
    ],
)
def test_what_cannot_be_meant_is_refused(given: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plain(given)


def test_a_home_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty HOME would put ~/x into the root of the filesystem."""
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ValueError, match="no such home folder"):
        plain("~/x")


def test_all_verbs_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    align = build(AlignConfig, {"captures": "~/a,~/b,c", "student": "~/s", "out": "~/o", "w": "~/w"})
    assert align.captures == [f"{home}/a", f"{home}/b", "c"]
    assert (align.student, align.out, align.w) == (f"{home}/s", f"{home}/o", f"{home}/w")
    assert build(ReportConfig, {"runs": ["~/a", "b"], "out": "r.html"}).runs == [f"{home}/a", "b"]
    train: dict[str, Any] = {"targets": "~/t", "student": "~/s", "out": "file://~/o", "eval_text": "~/e"}
    found = build(TrainConfig, train)
    assert (found.student.source, found.out, found.report.eval_text) == (f"{home}/s", f"{home}/o", f"{home}/e")
    log = build(PrecomputeConfig, {"corpus": "c", "teacher": "t", "out": "o", "log": "file://~/log"}).run.log
    assert log == f"{home}/log"


@pytest.mark.parametrize(
    ("model", "values", "said"),
    [
        (PrecomputeConfig, {"corpus": "", "teacher": "t", "out": "o"}, "^CORPUS: an empty path"),
        (PrecomputeConfig, {"corpus": "c", "teacher": "t", "out": "o", "revision": " "}, "^--revision: it is empty"),
        (AlignConfig, {"captures": "", "student": "s", "out": "o"}, "^CAPTURES: an empty path"),
        (AlignConfig, {"captures": "a,,b", "student": "s", "out": "o"}, "^CAPTURES: an empty path"),
        (TrainConfig, {"targets": "a,", "student": "s", "out": "o"}, "^TARGETS: an empty path"),
        (TrainConfig, {"targets": "a", "student": "s", "out": "o", "eval_text": ""}, "^--eval-text: an empty path"),
        (ReportConfig, {"runs": ["a", ""], "out": "o"}, "^RUNS: an empty path"),
    ],
)
def test_empty_words_name_their_flag(model: type[Config], values: dict[str, Any], said: str) -> None:
    """An unset variable between quotes; a list must not get shorter by one."""
    with pytest.raises(XtokenError, match=said):
        build(model, values)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_outputs_that_cannot_be_made(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for name, said in (
        ("file/x", "cannot be made"),
        ("file/x/y", "cannot be made"),
        ("x" * 300, "File name too long"),
        ("lost", "link to nothing"),
    ):
        with pytest.raises(XtokenError, match=said):
            refuse_unusable(str(tmp_path / name), kind)
    for name, said in (("/", "root of the filesystem"), ("//..", "root of the"), ("/proc/x/y", "cannot be made")):
        with pytest.raises(XtokenError, match=said):
            refuse_unusable(name, kind)
    with pytest.raises(XtokenError, match="cannot be written"):
        refuse_unusable("simplecache::s3://b/c", kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "lost"], "nothing stays behind"


def test_outputs_of_the_wrong_kind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(XtokenError, match="is a file, and a folder"):
        refuse_unusable(str(tmp_path / "file"), "folder")
    with pytest.raises(XtokenError, match="is a folder, and a file"):
        refuse_unusable(str(tmp_path), "file")
    with pytest.raises(XtokenError, match="not a plain file"):
        refuse_unusable(os.devnull, "file")
    refuse_unusable(os.devnull, "log")
    for value in (str(tmp_path / "a" / "b"), str(tmp_path), "s3://bucket/x"):
        refuse_unusable(value, "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = tmp_path / "lost"
    lost.mkdir()
    monkeypatch.chdir(lost)
    refuse_lost_folder()
    lost.rmdir()
    with pytest.raises(XtokenError, match="working folder is gone"):
        refuse_lost_folder()


def test_double_colons_are_chains_only_where_fsspec_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a::b", str(tmp_path / "zip::x"), "./zip::x", "s3://bucket/a::b"):
        assert not is_chain(name)
    for url in ("zip://a::b.zip", "simplecache::s3://b/c"):
        assert is_chain(url)
    (tmp_path / "a::b").write_bytes(b"1")
    fs, path = open_filesystem("a::b")
    assert is_local("a::b")
    assert fs.cat_file(path) == b"1"
    for url in ("zip://x::nothing.zip", "zip://x::a::b"):
        with pytest.raises(XtokenError, match="cannot be opened"):
            open_filesystem(url)
    pytest.importorskip("s3fs")
    assert open_filesystem("s3://bucket/a::b/c")[1] == "bucket/a::b/c"


def test_configurations_still_take_what_they_took() -> None:
    assert CorpusConfig(corpus="c", text_field=" x").text_field == " x"
    assert QueryConfig(path="p", sql=None).sql is None
