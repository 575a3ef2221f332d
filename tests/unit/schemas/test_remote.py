"""What networks and servers raise comes out with the URL and the way out; hf:// URLs mean what the hub means."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from schemas.cache import cached
from schemas.errors import XtokenError
from schemas.manifest import read_any_manifest
from schemas.remote import in_parallel, is_local, named_errors, open_filesystem, open_url, read_footer

KNOWN = import_module("fsspec.registry")._registry  # the name fsspec.registry is also that of a mapping


def raised(error: BaseException, url: str) -> BaseException:
    with pytest.raises(BaseException) as caught, named_errors(url):  # noqa: PT011 - any, and which is the question
        raise error
    return caught.value


def test_refusals_name_url_answer_and_way_out() -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    for error, said in (
        (PermissionError("Access Denied."), "Access Denied."),
        (TimeoutError("slow"), "slow"),
        (ConnectionResetError(104, "reset by peer"), "reset by peer"),
        (OSError(5, "Internal Error"), "Internal Error"),
        (botocore.NoCredentialsError(), "Unable to locate credentials"),
        (botocore.EndpointConnectionError(endpoint_url="http://nowhere"), "http://nowhere"),
    ):
        found = raised(error, "s3://bucket/name")
        assert type(found) is XtokenError
        for part in ("s3://bucket/name", said, "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL_S3"):
            assert part in str(found)
    assert "HF_TOKEN" in str(raised(PermissionError("401"), "hf://datasets/a/b"))


def test_what_callers_understand_and_our_defects_pass() -> None:
    for error in (
        FileNotFoundError("x"),
        FileExistsError("x"),
        KeyError("x"),
        OSError(28, "full"),
        KeyboardInterrupt(),
    ):
        assert raised(error, "s3://bucket/name") is error
    damaged = OSError("Couldn't deserialize thrift")  # pyarrow's, without number
    assert raised(damaged, "s3://bucket/name") is damaged
    local = PermissionError(13, "denied")
    assert raised(local, "/some/path") is local


def test_a_client_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KNOWN, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(XtokenError, match=r"pip install 'xtoken\[s3\]'"):
        open_filesystem("s3://bucket/name")
    with pytest.raises(XtokenError, match="check the URL"):
        open_filesystem("gopher4://bucket/name")


class _Hub(MemoryFileSystem):  # type: ignore[misc]
    """Stands for huggingface_hub's filesystem: paths OWNER/NAME@REVISION/FILE below datasets/."""

    protocol = "hf"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol("memory://" + path.removeprefix("hf://").lstrip("/")))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    """A hub in memory with one dataset at two revisions."""
    monkeypatch.setitem(KNOWN, "hf", _Hub)
    fs = _Hub()
    yield fs
    fs.rm("/datasets", recursive=True)


def test_hub_urls_with_and_without_revision(hub: _Hub, tmp_path: Path) -> None:
    for name, data in (("owner/name", b"main"), ("owner/name@v1", b"first")):
        hub.pipe_file(f"/datasets/{name}/data/part-00000.parquet", data)
        url = f"hf://datasets/{name}/data/part-00000.parquet"
        assert not is_local(url)
        with open_url(url) as file:
            assert file.read() == data
    with pytest.raises(XtokenError, match=r"hf://datasets/owner/name@v1/manifest\.json does not exist"):
        read_any_manifest("hf://datasets/owner/name@v1")


def test_the_real_hub_filesystem_reads_these_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What huggingface_hub makes of our URLs, as far as that needs no network."""
    fs, path = open_filesystem("hf://datasets/owner/name@v1/data/part-00000.parquet")
    assert type(fs).__name__ == "HfFileSystem"
    assert path == "datasets/owner/name@v1/data/part-00000.parquet"
    # offline, as these tests run: a sentence, no traceback
    with pytest.raises(XtokenError, match=r"hf://datasets/owner/name.*HF_TOKEN"):
        read_any_manifest("hf://datasets/owner/name")


@pytest.fixture
def footer_of() -> Iterator[Callable[[bytes], object]]:
    """``footer_of(data)``: read the footer of a remote file with this content."""
    fs = fsspec.filesystem("memory")

    def read(data: bytes) -> object:
        fs.pipe_file("/footers/x.parquet", data)
        return read_footer("memory://footers/x.parquet")

    yield read
    fs.rm("/footers", recursive=True)


def test_footers_come_without_their_files(footer_of: Callable[[bytes], object]) -> None:
    for columns in (2, 3000):  # a footer within the first request, and one beyond it
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({f"column {n}": [n, n] for n in range(columns)}), sink)
        found = footer_of(sink.getvalue().to_pybytes())
        assert (found.num_rows, found.num_columns) == (2, columns)  # type: ignore[attr-defined]
    for damaged in (b"", b"PAR1", b"x" * 100, b"PAR1\xff\xff\xff\x7fPAR1"):
        with pytest.raises((pa.ArrowException, OSError)):
            footer_of(damaged)


def test_many_requests_keep_their_order() -> None:
    assert in_parallel(str, range(100), "memory://x") == [str(n) for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda n: 1 // n, range(3), "memory://x")


def test_targets_and_captures_need_no_package_for_local_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    (tmp_path / "x").write_bytes(b"1")
    with cached(str(tmp_path / "x"), "") as path:
        assert Path(path).read_bytes() == b"1"
