"""Requests to a vLLM server over HTTP: to the named server alone, patient with it, and with replies of bounded size.

The key of the environment goes into one header, to the server that was named. Redirects are refused, so it goes nowhere
else, and it stands in no message, record or log.
"""

import ipaddress
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from xtoken.pipeline.teachers.base import EngineLost
from xtoken.schemas.errors import XtokenError

KEY = "XTOKEN_SERVER_KEY"
# A server that restarts loads a model first.
_PATIENCE_SECONDS = 900.0
_BACKOFF_SECONDS = (0.5, 30.0)
_SAID_AFTER = 2.0  # seconds between two tries; before that an outage is not worth a line
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_LATER = frozenset({408, 429, 500, 502, 503, 504})
# Errors of a server to one request while it serves others, before the request is to blame.
_IN_SPITE = 5
_SHOWN = 300  # characters of what a server says
_LOG = logging.getLogger("xtoken")


def origin(url: str, *, insecure: bool) -> str:
    """The server's address as it was named, checked.

    Raises:
        XtokenError: it is no address of a server, holds a key, or is in the clear over a network.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise XtokenError(f"--server {_without_key(url)!r} is not an address; say https://HOST:PORT")
    if parts.username is not None or parts.password is not None:
        raise XtokenError(f"--server {_without_key(url)!r} holds a key; put it into the environment, as {KEY}")
    if parts.scheme == "http" and not insecure and not _is_here(parts.hostname):
        raise XtokenError(
            f"--server {url!r} is in the clear: whoever is on the way reads key and texts, and can change rows; "
            "say https://, or --insecure if the network is your own"
        )
    return url.rstrip("/").removesuffix("/v1")


def _without_key(url: str) -> str:
    return url.rpartition("@")[2]


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Client:
    """One server; for several threads at once."""

    def __init__(self, server: str, *, patience: float = _PATIENCE_SECONDS) -> None:
        """Nothing is sent yet.

        Args:
            server: see ``origin``.
            patience: seconds that a server may be away, or refuse for now, before it is given up.
        """
        self.server, self._patience = server, patience
        key = os.environ.get(KEY)
        # trust_env would send keys of .netrc, and take proxies, from the environment
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT,
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=256),
        )
        self._closed = threading.Event()
        self._served = 0  # requests

    def close(self) -> None:
        """Send nothing more; whoever waits for the server stops."""
        self._closed.set()
        self._client.close()

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, most: int = 1 << 20) -> bytes:
        """The reply to a request, made again while the server is away or says later.

        Args:
            path: behind the server's address.
            body: to POST as JSON; None: GET.
            most: bytes that are read of it.

        Raises:
            EngineLost: the server was away for too long.
            XtokenError: it refuses, sends elsewhere, says more than ``most`` bytes, or serves others and not this one.
        """
        until, wait, said = time.monotonic() + self._patience, _BACKOFF_SECONDS[0], False
        served, in_spite = self._served, 0
        while True:
            try:
                status, headers, data = self._once(path, body, most)
            except httpx.DecodingError as error:
                raise XtokenError(f"{self.server}{path} sends what it calls compressed and is not: {error}") from error
            except httpx.TransportError as error:
                if _of_certificate(error):
                    raise XtokenError(
                        f"{self.server} has no certificate that this machine trusts ({error}); have SSL_CERT_FILE name "
                        "the file with your authority's"
                    ) from error
                why, asked = f"{type(error).__name__}: {str(error)[:_SHOWN]}", 0.0
            else:
                if status == 200:
                    self._served += 1
                    return data
                if status not in _LATER:
                    raise self._refusal(path, status, headers, data)
                in_spite += status == 500 and self._served > served
                served = self._served
                if in_spite >= _IN_SPITE:
                    raise XtokenError(
                        f"{self.server}{path} serves other requests and answered HTTP 500 to this one {in_spite} "
                        f"times: {_said(data)}; look for the request in its log"
                    )
                why, asked = f"HTTP {status}: {_said(data)}", _seconds(headers.get("retry-after"))
            if time.monotonic() + wait > until or self._closed.is_set():
                raise EngineLost(f"{self.server}{path} was out of reach for {self._patience:.0f} s ({why})")
            if not said and wait > _SAID_AFTER:
                said = True
                _LOG.warning(
                    "%s is out of reach, or busy; asking again for %.0f s (%s)", self.server, self._patience, why
                )
            # what was shed together does not come back together
            self._closed.wait(max(asked, wait * random.uniform(0.5, 1.0)))
            wait = min(2 * wait, _BACKOFF_SECONDS[1])

    def _once(self, path: str, body: Mapping[str, Any] | None, most: int) -> tuple[int, httpx.Headers, bytes]:
        method = "GET" if body is None else "POST"
        with self._client.stream(method, self.server + path, json=body) as reply:
            parts, size = [], 0
            for part in reply.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise XtokenError(f"{self.server}{path} replied with more than {most} bytes; it is no vLLM server")
            return reply.status_code, reply.headers, b"".join(parts)

    def _refusal(self, path: str, status: int, headers: httpx.Headers, data: bytes) -> XtokenError:
        where = f"{self.server}{path}"
        if 300 <= status < 400:
            there = urlsplit(headers.get("location", "")).netloc or "nowhere"
            return XtokenError(
                f"{where} sends on to {there[:_SHOWN]}, where nothing is sent; name that server if it is meant"
            )
        if status in (401, 403):
            return XtokenError(f"{where} refuses (HTTP {status}: {_said(data)}); put its key into {KEY}")
        if status == 404:
            return XtokenError(
                f"{where} does not exist (HTTP 404: {_said(data)}); --server takes the address of "
                "'vllm serve' without /v1"
            )
        return XtokenError(f"{where} refuses what it was asked (HTTP {status}): {_said(data)}")


def _of_certificate(error: BaseException | None) -> bool:
    """Whether TLS refused the server, which no patience mends."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _seconds(after: str | None) -> float:
    """What a server asks for before the next try, at most a minute; 0 where it says nothing, or a date."""
    try:
        return min(60.0, max(0.0, float(after or 0)))
    except ValueError:
        return 0.0


def _said(data: bytes) -> str:
    return " ".join(data[: 4 * _SHOWN].decode("utf-8", "replace").split())[:_SHOWN]
