"""What networks and servers raise comes out with the URL and the way out; hf:// URLs mean what the hub means."""

import gzip
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from xtoken.schemas.errors import Unreachable, XtokenError
from xtoken.schemas.io.cache import cached
from xtoken.schemas.io.remote import (
    in_parallel,
    is_local,
    may_pass,
    named_errors,
    open_filesystem,
    open_url,
    patiently,
    read_footer,
)
from xtoken.schemas.manifest import read_any_manifest

KNOWN = import_module("fsspec.registry")._registry  # the name fsspec.registry is also that of a mapping


def raised(error: BaseException, url: str) -> BaseException:
    with pytest.raises(BaseException) as caught, named_errors(url):  # noqa: PT011 - any, and which is the question
        raise error
    return caught.value


def test_refusals_name_url_answer_and_way_out() -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    for error, said, kind in (
        (PermissionError("Access Denied."), "Access Denied.", XtokenError),
        (TimeoutError("slow"), "slow", Unreachable),
        (ConnectionResetError(104, "reset by peer"), "reset by peer", Unreachable),
        (OSError(5, "Internal Error"), "Internal Error", XtokenError),
        (botocore.NoCredentialsError(), "Unable to locate credentials", XtokenError),
        (botocore.EndpointConnectionError(endpoint_url="http://nowhere"), "http://nowhere", Unreachable),
    ):
        found = raised(error, "s3://bucket/name")
        assert type(found) is kind
        for part in ("s3://bucket/name", said, "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL_S3"):
            assert part in str(found)
    assert "HF_TOKEN" in str(raised(PermissionError("401"), "hf://datasets/a/b"))


@pytest.mark.parametrize(
    ("status", "code", "passes"),
    [
        (500, "InternalError", True),
        (502, "502", True),
        (503, "SlowDown", True),
        (503, "503", True),
        (400, "RequestTimeout", True),
        (409, "ConditionalRequestConflict", True),
        (429, "TooManyRequests", True),
        (400, "InvalidRequest", False),
        (403, "AccessDenied", False),
        (403, "RequestTimeTooSkewed", False),
        (412, "PreconditionFailed", False),
        (501, "NotImplemented", False),
    ],
)
def test_what_a_server_answers_may_pass_or_not(status: int, code: str, passes: bool) -> None:
    """As botocore raises it and as s3fs translates it, which loses the status."""
    botocore, s3fs = pytest.importorskip("botocore.exceptions"), pytest.importorskip("s3fs.errors")
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = botocore.ClientError(answer, "PutObject")
    assert may_pass(error) == passes
    assert may_pass(s3fs.translate_boto_error(error)) == passes


def test_a_certificate_that_is_refused_does_not_pass() -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    assert not may_pass(botocore.SSLError(endpoint_url="https://nowhere", error="self-signed"))


class _Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def test_patience_has_a_rhythm_and_an_end() -> None:
    clock, tries = _Clock(), []

    def step() -> int:
        tries.append(clock())
        if len(tries) < 4:
            raise Unreachable("down")
        return 7

    assert patiently(step, 60.0, sleep=clock.sleep, clock=clock) == 7
    assert all(low / 2 <= found <= low for found, low in zip(clock.slept, (0.5, 1.0, 2.0), strict=True))
    tries.clear()
    clock.slept.clear()
    with pytest.raises(Unreachable):
        patiently(lambda: [tries.append(clock()), raised_now()], 120.0, sleep=clock.sleep, clock=clock)
    assert len(tries) > 6
    assert max(clock.slept) <= 30
    assert tries[-1] - tries[0] <= 120


def raised_now() -> None:
    raise Unreachable("down")


def test_nothing_else_is_tried_again() -> None:
    tries = []
    with pytest.raises(XtokenError):
        patiently(lambda: [tries.append(1), refuse()])
    assert tries == [1]


def refuse() -> None:
    raise XtokenError("refused")


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
    assert raised(local, "file:///some/path") is local
    junk = gzip.BadGzipFile("Not a gzipped file (b'ju')")
    assert raised(junk, "s3://bucket/name") is junk


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


def test_a_name_that_cannot_be_reached_says_nothing_about_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(XtokenError, match="cannot be reached") as caught:
            read_any_manifest(str(root))
        assert caught.value.exit_code == 2


def test_many_requests_keep_their_order() -> None:
    assert in_parallel(str, range(100), "memory://x") == [str(n) for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda n: 1 // n, range(3), "memory://x")


def test_targets_and_captures_need_no_package_for_local_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    (tmp_path / "x").write_bytes(b"1")
    with cached(str(tmp_path / "x"), "") as path:
        assert Path(path).read_bytes() == b"1"
