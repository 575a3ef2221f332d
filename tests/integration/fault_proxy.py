"""A proxy in front of a real S3 server that does what networks and servers do: by rule, from a seed, with counters.

Headers are passed on unchanged, Host too, so signatures hold. Each request meets at most one fault, before it is passed
on (the server never saw it) or after (it did its work, and nobody was told).
"""

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from free_ports import free_ports

KINDS = ("500", "503", "reset", "silent", "slow", "truncated")
_SLOW_SECONDS = 0.3
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message><RequestId>1</RequestId></Error>"
_NAMES = {500: ("InternalError", "we encountered an internal error"), 503: ("SlowDown", "reduce your request rate")}


@dataclass(frozen=True)
class Rule:
    """What may happen to some requests.

    Attributes:
        kind: one of ``KINDS``.
        chance: of a request that the rule is about.
        after: whether the request is passed on before it happens.
        method: HTTP method; any when empty.
        path: what the path must contain.
        most: how often it happens at most.
        latest: from this request on it is certain, if it has not happened yet.
    """

    kind: str
    chance: float = 1.0
    after: bool = False
    method: str = ""
    path: str = ""
    most: int = 1 << 30
    latest: int = 1 << 30

    @property
    def name(self) -> str:
        """For counters."""
        return self.kind if self.kind in ("slow", "truncated") else f"{self.kind} {'after' if self.after else 'before'}"


def storm(chance: float) -> list[Rule]:
    """Every fault, each with its share of ``chance``; silence is rarer, since a client's patience is long.

    How many requests a run makes depends on its timing, so chance alone would leave a fault out now and then.
    """
    both = [Rule(kind, after=after) for kind in ("500", "503", "reset") for after in (False, True)]
    kinds = [*both, Rule("slow"), Rule("truncated", method="GET"), Rule("truncated", method="GET")]
    share = chance / len(kinds)
    rules = [replace(rule, chance=share) for rule in kinds]
    rules += [Rule("silent", share / 4, after) for after in (False, True)]
    return [replace(rule, latest=8 * number) for number, rule in enumerate(rules, 1)]


class FaultProxy:
    """Runs in threads of this process; ``rules`` may be set at any time.

    Args:
        upstream: endpoint of the server.
        seed: of the choice of requests that a rule with a chance hits.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.rules: Sequence[Rule] = ()
        self.happened: Counter[str] = Counter()
        self.requests = 0
        self.upstream = urlsplit(upstream).netloc
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._open: set[socket.socket] = set()
        (self._port,) = free_ports(1)  # bound again after each outage

    @property
    def endpoint(self) -> str:
        """What clients are given."""
        return f"http://127.0.0.1:{self._port}"

    def choose(self, method: str, path: str) -> Rule | None:
        """The fault of one request."""
        with self._lock:
            self.requests += 1
            for rule in self.rules:
                about = rule.method in ("", method) and rule.path in path
                due = self.requests >= rule.latest and not self.happened[rule.name]
                if about and (due or self._random.random() < rule.chance) and self.happened[rule.name] < rule.most:
                    self.happened[rule.name] += 1
                    return rule
        return None

    def up(self) -> None:
        """Accept connections."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and cut those that are open."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for connection in list(self._open):
            cut(connection)

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Nothing is there inside the block."""
        self.down()
        self.happened["outage"] += 1
        try:
            yield
        finally:
            self.up()

    def track(self, connection: socket.socket, *, is_open: bool) -> None:
        """Remember connections, so that they can be cut."""
        (self._open.add if is_open else self._open.discard)(connection)


@contextmanager
def faults_before(upstream: str, seed: int = 0) -> Iterator[FaultProxy]:
    """A proxy that runs inside the block."""
    proxy = FaultProxy(upstream, seed)
    proxy.up()
    try:
        yield proxy
    finally:
        proxy.rules = ()
        proxy.down()


def cut(connection: socket.socket) -> None:
    """Close with a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    with contextlib.suppress(OSError):
        connection.close()


class _Handler(BaseHTTPRequestHandler):
    """One client connection."""

    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.proxy.track(self.connection, is_open=True)

    def finish(self) -> None:
        self.proxy.track(self.connection, is_open=False)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the client, or a fault, has closed it
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing."""

    def _serve(self) -> None:
        body = self._body()
        rule = self.proxy.choose(self.command, self.path)
        if rule is not None and rule.kind == "slow":
            time.sleep(_SLOW_SECONDS)
        if rule is not None and not rule.after and rule.kind in _FAULTS:
            _FAULTS[rule.kind](self)
            return
        with self._forwarded(body) as reply:
            content = reply.read()
            if rule is not None and rule.after:
                _FAULTS[rule.kind](self)
                return
            short = rule is not None and rule.kind == "truncated" and reply.status in (200, 206)
            self._answer(reply, content[: len(content) // 2] if short else content, cut_off=short)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    @contextmanager
    def _forwarded(self, body: bytes) -> Iterator[HTTPResponse]:
        connection = HTTPConnection(self.proxy.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect", "transfer-encoding"):
                connection.putheader(name, value)
        if "Content-Length" not in self.headers and body:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        try:
            yield connection.getresponse()
        finally:
            connection.close()

    def _answer(self, reply: HTTPResponse, content: bytes, *, cut_off: bool) -> None:
        self.send_response_only(reply.status, reply.reason)
        length = reply.headers.get("Content-Length", str(len(content)))
        for name, value in reply.headers.items():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        if reply.status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        if cut_off:
            self._cut()

    def error(self, status: int) -> None:
        """An answer of S3's that is an error."""
        code, text = _NAMES[status]
        content = b"" if self.command == "HEAD" else _ERROR.format(code=code, text=text).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reset(self) -> None:
        """Close without an answer."""
        self._cut()

    def say_nothing(self) -> None:
        """Until the client gives up, or the proxy ends."""
        self.connection.settimeout(60)
        with contextlib.suppress(OSError):
            self.connection.recv(1)
        self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        cut(self.connection)


_FAULTS: dict[str, Callable[[_Handler], None]] = {
    "500": lambda handler: handler.error(500),
    "503": lambda handler: handler.error(503),
    "reset": _Handler.reset,
    "silent": _Handler.say_nothing,
}
