"""The local cache of remote files: content, bound, eviction, and several processes at once."""

import errno
import hashlib
import io
import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.cache import Cache, cached, fresh


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of 1000 bytes."""
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XTOKEN_CACHE_BYTES", "1000")
    return tmp_path / "cache"


@pytest.fixture
def remote() -> Iterator[str]:
    """A folder on a filesystem that is not local."""
    yield "memory://remote"
    fsspec.filesystem("memory").rm("/remote", recursive=True)


def put(url: str, data: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(data)
    return sha(data)


def taken(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir())


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.name != ".lock"}


def test_a_remote_file_is_fetched_once(cache: Path, remote: str) -> None:
    found = put(f"{remote}/a", b"content")
    with cached(f"{remote}/a", found, 7) as path:
        assert Path(path).read_bytes() == b"content"
    fsspec.filesystem("memory").rm("/remote/a")
    with cached(f"{remote}/a", found, 7) as path:
        assert Path(path).read_bytes() == b"content"
    assert names(cache) == {found}
    with pytest.raises(FileNotFoundError), cached(f"{remote}/a", "0" * 64, 7):
        pass
    put(f"{remote}/a", b"")


def test_local_files_are_used_where_they_lie(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    for url in (str(tmp_path / "a"), f"file://{tmp_path}/a"):
        with cached(url, "unchecked") as path:
            assert Path(path) == tmp_path / "a"
        with fresh(url) as copy:
            assert (Path(copy.path), copy.sha256, copy.size) == (tmp_path / "a", sha(b"content"), 7)
    assert not cache.exists()


@pytest.mark.parametrize("data", [b"c0ntent", b"content and more", b"cont", b""])
def test_other_content_is_refused_and_leaves_nothing(data: bytes, cache: Path, remote: str) -> None:
    put(f"{remote}/a", data)
    with pytest.raises(VerificationError) as caught, cached(f"{remote}/a", sha(b"content"), 7):
        pass
    for part in (f"{remote}/a", sha(b"content"), sha(data[:8])):  # no more than one byte too many is read
        assert part in str(caught.value)
    assert not names(cache)


def test_what_is_no_sha256_never_becomes_a_path(cache: Path, remote: str) -> None:
    put(f"{remote}/a", b"content")
    for name in ("../../escaped", "", "A" * 64, "0" * 63):
        with pytest.raises(VerificationError, match="not a sha256"), cached(f"{remote}/a", name, 7):
            pass
    assert not cache.exists()


def test_the_least_recently_used_goes_first(cache: Path, remote: str) -> None:
    content = {name: name.encode() * 300 for name in "abcd"}
    found = {name: put(f"{remote}/{name}", data) for name, data in content.items()}
    for name in "abcad":  # the second use of a saves it
        with cached(f"{remote}/{name}", found[name], 300):
            assert taken(cache) <= 1000
    assert names(cache) == {found[name] for name in "acd"}


def test_uses_within_a_tick_of_the_systems_clock_have_an_order(
    cache: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, stamps, utime = put(f"{remote}/a", b"content"), [], os.utime

    def within_a_tick(file: int, *, ns: tuple[int, int] = (0, 0)) -> None:
        utime(file, ns=ns)

    monkeypatch.setattr("xtoken.schemas.io.cache.os.utime", within_a_tick)
    for _ in range(3):
        with cached(f"{remote}/a", found, 7) as path:
            stamps.append(Path(path).stat().st_mtime_ns)
    assert stamps == sorted(set(stamps))


def test_a_file_in_use_stays_and_room_is_waited_for(cache: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtoken.schemas.io.cache._PATIENCE_SECONDS", 0.0)
    first, second, third = (put(f"{remote}/{name}", name.encode() * 400) for name in "abc")
    with cached(f"{remote}/a", first, 400) as path:
        refused = pytest.raises(XtokenError, match="XTOKEN_CACHE_BYTES to more")
        with cached(f"{remote}/b", second, 400), refused, cached(f"{remote}/c", third, 400):
            pass
        with cached(f"{remote}/c", third, 400):
            assert names(cache) == {first, third}
        assert Path(path).read_bytes() == b"a" * 400


def test_what_can_never_fit_is_refused_before_a_byte_is_read(cache: Path, remote: str) -> None:
    kept, found = put(f"{remote}/a", b"a" * 900), put(f"{remote}/b", b"b" * 1001)
    with cached(f"{remote}/a", kept, 900):
        pass
    for size in (1001, None, 10**15):
        with pytest.raises(XtokenError, match="XTOKEN_CACHE_BYTES") as caught, cached(f"{remote}/b", found, size):
            pass
        assert not isinstance(caught.value, VerificationError)
    assert names(cache) == {kept}


def test_fresh_copies_ignore_the_cache_and_go(cache: Path, remote: str) -> None:
    found = put(f"{remote}/a", b"content")
    with cached(f"{remote}/a", found, 7):
        pass
    put(f"{remote}/a", b"changed!")
    with fresh(f"{remote}/a") as copy:
        assert (copy.sha256, copy.size) == (sha(b"changed!"), 8)
        assert Path(copy.path).read_bytes() == b"changed!"
    assert names(cache) == {found}


def test_a_full_disk_is_named(cache: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = put(f"{remote}/a", b"content")

    def full(*_: object) -> tuple[str, int]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xtoken.schemas.io.cache._copy", full)
    full_disk = r"no room for 7 bytes in the cache .* set XTOKEN_CACHE"
    with pytest.raises(XtokenError, match=full_disk), cached(f"{remote}/a", found, 7):
        pass
    assert not names(cache)


def test_what_a_dead_download_left_is_removed(cache: Path, remote: str) -> None:
    found = put(f"{remote}/a", b"a" * 900)
    cache.mkdir()
    (cache / f"{found}.900.0123456789ab.tmp").write_bytes(b"a" * 500)
    with cached(f"{remote}/a", found, 900) as path:
        assert Path(path).read_bytes() == b"a" * 900
    assert names(cache) == {found}


class _Counting(AbstractFileSystem):  # type: ignore[misc]
    """Files ``LETTER-SIZE`` that hold the letter that often; every opening leaves a byte in a log of all processes."""

    protocol = "counting"

    def _open(self, path: str, *_: object, **__: object) -> io.BytesIO:
        with open(os.environ["OPENED"], "ab") as log:
            log.write(b".")
        return io.BytesIO(content(path))


def content(name: str) -> bytes:
    letter, size = name.rsplit("/", 1)[-1].split("-")
    return letter.encode() * int(size)


def _reader(seed: int, files: list[tuple[str, str, int]], limit: int, wrong: "multiprocessing.Queue[str]") -> None:
    """Reads files in its own order, watching content and bound."""
    fsspec.register_implementation("counting", _Counting)
    order = random.Random(seed)
    for _ in range(40):
        name, digest, size = order.choice(files)
        with cached(name, digest, size) as path:
            if Path(path).read_bytes() != content(name):
                wrong.put(f"{name} has other content")
            sizes = 0
            for one in Path(path).parent.iterdir():
                try:
                    sizes += one.stat().st_size
                except FileNotFoundError:
                    continue
            if sizes > limit:
                wrong.put(f"{sizes} bytes")


def _run_readers(
    count: int, files: list[tuple[str, str, int]], limit: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[4]))  # where a new process finds this module
    context = multiprocessing.get_context("spawn")
    wrong: multiprocessing.Queue[str] = context.Queue()
    readers = [context.Process(target=_reader, args=(seed, files, limit, wrong)) for seed in range(count)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    assert [reader.exitcode for reader in readers] == [0] * count
    return [wrong.get() for _ in range(wrong.qsize())]


def files_of(*names: str) -> list[tuple[str, str, int]]:
    return [(f"counting://many/{name}", sha(content(name)), len(content(name))) for name in names]


def test_processes_that_evict_each_others_files_read_the_right_bytes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENED", str(tmp_path / "opened"))
    assert _run_readers(3, files_of("a-100", "b-300", "c-300", "d-200", "e-250"), 1000, monkeypatch) == []
    assert 5 < (tmp_path / "opened").stat().st_size < 120  # some were evicted, some were found
    assert not [name for name in names(cache) if name.endswith(".tmp")]


def test_processes_that_want_the_same_files_download_each_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENED", str(tmp_path / "opened"))
    assert _run_readers(3, files_of("a-300", "b-300", "c-300"), 1000, monkeypatch) == []
    assert (tmp_path / "opened").stat().st_size == 3


def test_a_limit_is_20_gb_unless_it_is_set_to_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "a" / "b"))
    monkeypatch.setenv("XTOKEN_CACHE_BYTES", "many")
    with pytest.raises(XtokenError, match="XTOKEN_CACHE_BYTES='many' is not a size"):
        Cache.of_environment()
    monkeypatch.delenv("XTOKEN_CACHE_BYTES")
    assert Cache.of_environment() == Cache(tmp_path / "a" / "b", 20 * 10**9)


def test_a_cache_folder_that_cannot_be_is_named(tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(XtokenError, match="set XTOKEN_CACHE to another"), cached(f"{remote}/a", "0" * 64, 1):
        pass
    put(f"{remote}/a", b"")
