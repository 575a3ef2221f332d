"""Files at URLs: opening them, and what the errors of networks and servers become.

Credentials and endpoints are those of fsspec and its clients: nothing of them passes through here.
"""

import errno
import gzip
import io
import os
import random
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from xtoken.schemas.errors import NO_ROOM, Unreachable, VerificationError, XtokenError
from xtoken.schemas.io.parquet_limits import FOOTER_BYTES
from xtoken.schemas.io.paths import is_chain

_WRONG_PLACE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)  # says nothing about the artifact
_AT_ONCE = 16  # small requests wait for the network, not for us
_TAIL = 1 << 16  # bytes that hold nearly every Parquet footer
_LOCAL = ("", "file", "local")  # protocols of this machine's own files
# Packages that reach servers; their errors are not defects of ours.
_CLIENTS = {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google"}
_CLIENTS |= {"httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "requests", "s3fs", "urllib3"}
_INSTALL = {"s3": "pip install 'xtoken[s3]'", "s3a": "pip install 'xtoken[s3]'"}
_S3 = (
    "check bucket and rights; keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), "
    "a server other than Amazon's from AWS_ENDPOINT_URL_S3"
)
_WAY_OUT = {
    "s3": _S3,
    "s3a": _S3,
    "hf": "check the name and its rights; the token comes from HF_TOKEN or 'hf auth login'",
}
# What passes by itself, by the names that clients give it, the answer's HTTP status, and the system's error numbers.
_PASSING = {"ConnectionError", "Timeout", "TimeoutError", "FSTimeoutError", "HTTPClientError", "ChunkedEncodingError"}
_PASSING |= {"ClientConnectionError", "ClientPayloadError", "IncompleteRead", "ResponseParserError", "TransportError"}
_PASSING |= {"ServiceRequestError", "ServiceResponseError"}
_STAYING = {"SSLError", "ClientSSLError"}
_PASSING_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "InternalError"}
_PASSING_CODES |= {"ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict"}
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
_PASSING_ERRNO = {errno.EBUSY, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
_PASSING_ERRNO |= {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}
_ROUNDS = 2  # of s3fs, around botocore's five tries of a request; a download takes their square
_PATIENCE_SECONDS = 300.0
_BACKOFF_SECONDS = (0.5, 30.0)
T = TypeVar("T")
R = TypeVar("R")


def protocol(url: str) -> str:
    """``s3`` of ``s3://bucket/name``; empty for a path."""
    return url.split("://", 1)[0] if "://" in url else ""


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec filesystem of a folder or URL, and the path on it.

    Raises:
        XtokenError: the protocol is unknown, needs a package that is not installed, or refuses the URL.
    """
    try:
        with named_errors(url):
            fs, path = _opened(url)
    except ImportError as error:
        way_out = _INSTALL.get(protocol(url), "install what it names")
        raise XtokenError(f"{url} cannot be opened: {error}; {way_out}") from error
    except ValueError as error:
        raise XtokenError(f"{url} cannot be opened: {error}; check the URL") from error
    except Exception as error:  # a chain opens its archive at once, and each kind of archive has errors of its own
        if not is_chain(url):
            raise
        raise XtokenError(f"{url} cannot be opened ({type(error).__name__}: {error}); check the URL") from error
    if protocol(url) in ("s3", "s3a"):
        # five rounds of five tries, each until a time-out, are longer than a lease
        fs.retries = min(fs.retries, _ROUNDS)
    return fs, str(path)


def _opened(url: str) -> tuple[Any, str]:
    """As ``fsspec.core.url_to_fs``, which takes every ``::`` for a chain of filesystems, also in names."""
    if "::" not in url or is_chain(url):
        opened: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return opened
    kind = fsspec.get_filesystem_class(protocol(url) or "file")
    return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)


def is_local(url: str) -> bool:
    """Whether a path or URL is of this machine's own filesystem."""
    return isinstance(open_filesystem(url)[0], LocalFileSystem)


@contextmanager
def named_errors(url: str) -> Iterator[None]:
    """Turn what a network, a server or missing credentials raise inside the block into XtokenError with the way out.

    What may pass by itself (no answer, an answer of 5xx, throttling) becomes Unreachable. FileNotFoundError and
    FileExistsError stay what they are: callers know what they mean.
    """
    try:
        yield
    except Exception as error:
        if protocol(url) in _LOCAL or not _of_network(error):
            raise
        way_out = _WAY_OUT.get(protocol(url), "check the URL, and credentials as fsspec's client of it takes them")
        kind = Unreachable if may_pass(error) else XtokenError
        raise kind(f"{url}: {_said(error)}; {way_out}") from error


def may_pass(error: BaseException) -> bool:
    """Whether an error of a client or of the system says that the server is out of reach, or too busy, for now."""
    names = {base.__name__ for base in type(error).__mro__}
    if names & _STAYING or names & _PASSING:
        return not names & _STAYING
    # s3fs translates botocore's errors and loses the status
    answers = [one for one in (error, error.__cause__) if one is not None]
    if any(_answer(one, "Error", "Code") in _PASSING_CODES or _status(one) in _PASSING_STATUS for one in answers):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def _answer(error: BaseException, *keys: str) -> Any:
    """A value in what botocore keeps of an answer."""
    answer = getattr(error, "response", None)
    for key in keys:
        answer = answer.get(key) if isinstance(answer, dict) else None
    return answer


def _status(error: BaseException) -> int | None:
    """HTTP status of the answer that an error is about, as far as its client tells."""
    response = getattr(error, "response", None)
    code = _answer(error, "ResponseMetadata", "HTTPStatusCode")
    for value in (code, getattr(response, "status_code", None), getattr(error, "status", None)):
        if isinstance(value, int):
            return value
    code = str(getattr(error, "code", ""))  # gcsfs
    return int(code) if code.isdecimal() else None


def patiently(
    step: Callable[[], R],
    seconds: float = _PATIENCE_SECONDS,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> R:
    """What ``step`` returns, done again while its server is out of reach.

    Args:
        step: does no harm when it is done twice, also where the first time worked and only its answer was lost.
        seconds: after which no new try is begun.
        sleep, clock: of the process, for tests.

    Raises:
        Unreachable: of the last try.
    """
    until, wait = clock() + seconds, _BACKOFF_SECONDS[0]
    while True:
        try:
            return step()
        except Unreachable:
            if clock() + wait > until:
                raise
        sleep(wait * random.uniform(0.5, 1.0))  # workers that failed together do not come back together
        wait = min(2 * wait, _BACKOFF_SECONDS[1])


def _of_network(error: Exception) -> bool:
    if isinstance(error, XtokenError | FileNotFoundError | FileExistsError | gzip.BadGzipFile):
        return False
    if {base.__module__.split(".")[0] for base in type(error).__mro__} & _CLIENTS:
        return True
    # pyarrow reports damaged files as an OSError without number
    return isinstance(error, OSError) and error.errno not in NO_ROOM and (error.errno, type(error)) != (None, OSError)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


@contextmanager
def open_url(url: str) -> Iterator[IO[bytes]]:
    """A file to read, with errors of the network named; FileNotFoundError when nothing is there."""
    fs, path = open_filesystem(url)
    refuse_special(fs, path)
    with named_errors(url), fs.open(path, "rb") as file:
        yield file


def refuse_special(fs: Any, path: str) -> None:
    """Raise VerificationError for a local name of a folder, a device or a pipe, which could be read for ever.

    Raises:
        XtokenError: the name cannot be reached.
    """
    if not isinstance(fs, LocalFileSystem):
        return
    try:
        plain = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno in _WRONG_PLACE:
            raise XtokenError(f"{path} cannot be reached ({error.strerror}); check its path and rights") from error
        raise VerificationError(f"{path} cannot be read ({error.strerror}); fetch the artifact again") from error
    if not plain:
        raise VerificationError(f"{path} is not a plain file; fetch the artifact again")


def in_parallel(function: Callable[[T], R], items: Iterable[T], url: str) -> list[R]:
    """``function`` of each item in order; several at once where ``url`` is remote, so that requests overlap."""
    if is_local(url):
        return [function(item) for item in items]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))


def read_tail(url: str) -> io.BytesIO:
    """The end of a Parquet file, from its footer on.

    Raises:
        FileNotFoundError: nothing is there.
        pyarrow.ArrowException: it is not a Parquet file, or its footer claims to be longer than is read.
        XtokenError: the server cannot be asked.
    """
    fs, path = open_filesystem(url)
    refuse_special(fs, path)
    with named_errors(url):
        size = int(fs.size(path) or 0)
        tail = fs.cat_file(path, start=max(0, size - _TAIL), end=size)
        wanted = 8 + int.from_bytes(tail[-8:-4], "little")
        if wanted > FOOTER_BYTES:
            raise pa.ArrowInvalid(f"its footer claims {wanted} bytes")
        if wanted > len(tail):
            tail = fs.cat_file(path, start=max(0, size - wanted), end=size)
    return io.BytesIO(tail)


def read_footer(url: str) -> Any:
    """Parquet metadata of a file, of which only the end is read; see ``read_tail``."""
    return pq.read_metadata(read_tail(url))
