"""Where caches go when the home folder takes none: a folder of ours, of nobody else, said once."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas.compiled import compiled
from xtoken.schemas.io import cache_folders as module
from xtoken.schemas.io.cache_folders import settle_home

SET = ("XDG_CACHE_HOME", "XTOKEN_CACHE", "HF_MODULES_CACHE", "TRITON_CACHE_DIR", "WANDB_CONFIG_DIR", "XDG_CONFIG_HOME")
OTHERS = ("NUMBA_CACHE_DIR", "HOME", "HF_HOME", "XDG_DATA_HOME", "FLASHINFER_WORKSPACE_BASE", "LOGNAME")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with ``tmp`` for temporary files, ``home``, and ``file``, below which nobody can write."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "file").touch()
    kept = dict(os.environ)
    for name in (*SET, *OTHERS):
        os.environ.pop(name, None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path
    os.environ.clear()
    os.environ.update(kept)


def own(place: Path) -> Path:
    return place / "tmp" / f"xtoken-{os.getuid()}"


def test_a_home_that_can_be_written_stays(place: Path) -> None:
    os.environ["HOME"] = str(place / "home")
    assert settle_home() is None
    assert not set(SET) & set(os.environ)
    assert list((place / "home").iterdir()) == []


def test_an_empty_home_is_none(place: Path) -> None:
    os.environ["HOME"] = ""
    settle_home()
    assert os.environ.get("HOME") != ""


def test_a_home_that_cannot(place: Path) -> None:
    os.environ["HOME"] = str(place / "file")
    os.environ["TRITON_CACHE_DIR"] = "/chosen"
    said = settle_home()
    assert said is not None
    assert "\n" not in said
    assert str(own(place)) in said
    assert os.environ["XDG_CACHE_HOME"] == str(own(place))
    assert os.environ["XTOKEN_CACHE"] == str(own(place) / "xtoken")
    assert os.environ["TRITON_CACHE_DIR"] == "/chosen", "what the user has set stays"
    assert os.environ["HOME"] == str(place / "file"), "what is read there is still read"
    assert own(place).stat().st_mode & 0o777 == 0o700
    assert settle_home() is None, "said once, also by processes that this one starts"


def test_models_in_a_read_only_cache_stay_in_use(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = place / "home" / ".cache"
    (cache / "huggingface").mkdir(parents=True)
    os.environ["HOME"] = str(place / "home")
    can_write = module._can_write
    monkeypatch.setattr(module, "_can_write", lambda folder: folder != str(cache) and can_write(folder))
    assert settle_home() is not None
    assert os.environ["HF_HOME"] == str(cache / "huggingface")


def test_a_cache_folder_in_a_read_only_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pods mount it: what libraries write elsewhere in the home folder goes into it."""
    os.environ["HOME"], os.environ["XDG_CACHE_HOME"] = str(place / "file"), str(place / "home")
    assert settle_home() is None
    assert os.environ["TRITON_CACHE_DIR"] == str(place / "home" / "triton")
    assert "XTOKEN_CACHE" not in os.environ


def test_a_user_whom_nobody_knows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number without an entry in /etc/passwd, as clusters give; without HOME there is no folder to expand ~ to."""
    import pwd

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        os.environ.pop(name, None)
    monkeypatch.chdir(place / "home")
    assert settle_home() is not None
    assert os.environ["HOME"] == str(own(place))
    assert os.environ["LOGNAME"] == f"uid-{os.getuid()}"
    assert list((place / "home").iterdir()) == []


@pytest.mark.parametrize("there", ["open to all", "a link"])
def test_a_folder_that_others_could_have_made_is_not_used(place: Path, there: str) -> None:
    """Numba's cache is code."""
    os.environ["HOME"] = str(place / "file")
    if there == "a link":
        own(place).symlink_to(place / "home")
    else:
        own(place).mkdir()
        own(place).chmod(0o777)
    assert settle_home() is not None
    folder = Path(os.environ["XDG_CACHE_HOME"])
    assert folder != own(place)
    assert folder.parent == place / "tmp"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_nowhere_at_all(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["HOME"] = str(place / "file")
    monkeypatch.setattr(tempfile, "tempdir", str(place / "file"))
    said = settle_home()
    assert said is not None
    assert "nothing is cached" in said
    assert "XDG_CACHE_HOME" not in os.environ


SOURCE = """
from xtoken.schemas.compiled import compiled

@compiled
def plus_one(x):
    return x + 1

if __name__ == "__main__":
    assert plus_one(1) == 2
    print(sum(plus_one.stats.cache_hits.values()), plus_one.stats.cache_path)
"""


def test_loops_are_compiled_where_nothing_can_be_written(place: Path) -> None:
    """Beside the source lies a file where numba wants a folder, and home is one, too: it is cached in ours."""
    (place / "code").mkdir()
    (place / "code" / "loops.py").write_text(SOURCE)
    (place / "code" / "__pycache__").touch()
    root = Path(module.__file__).parents[2]
    env = {**os.environ, "HOME": str(place / "file"), "TMPDIR": str(place / "tmp"), "PYTHONPATH": str(root)}
    words = [sys.executable, str(place / "code" / "loops.py")]
    said = [subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert [line.split()[0] for line in said] == ["0", "1"]
    assert str(own(place)) in said[1]


def loops(folder: Path, name: str = "loops.py") -> Any:
    """``plus_one`` as if imported from a file in a folder."""
    (folder / name).write_text(SOURCE)
    made: dict[str, Any] = {"__name__": "loops"}
    exec(compile(SOURCE, str(folder / name), "exec"), made)
    return made["plus_one"]


def test_a_function_without_a_file_is_compiled_without_a_cache() -> None:
    made: dict[str, Any] = {}
    exec(compile("def plus_one(x):\n    return x + 1", "<nowhere>", "exec"), made)
    assert compiled(made["plus_one"])(1) == 2


def test_a_cache_that_gets_lost_or_damaged_costs_time_only(tmp_path: Path) -> None:
    plus_one = loops(tmp_path)
    cache = tmp_path / "__pycache__"
    cache.rmdir()
    cache.touch()  # as a folder that became read-only between import and first call
    assert plus_one(1) == 2
    cache.unlink()
    cache.mkdir()
    plus_one = loops(tmp_path)
    assert plus_one(1) == 2
    (index,) = cache.glob("*.nbi")
    index.write_bytes(b"damaged")
    assert loops(tmp_path)(1) == 2
