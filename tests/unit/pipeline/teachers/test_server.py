"""A teacher behind a server: what a real HTTP server may answer, rightly and wrongly."""

import ipaddress
import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from xtoken.pipeline.teachers import check_backend, check_reach, open_teacher, server_client
from xtoken.pipeline.teachers.base import EngineLost
from xtoken.pipeline.teachers.server_client import KEY, Client, origin
from xtoken.pipeline.teachers.server_teacher import Entry, ServerTeacher, entries_of
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError

K = 3
Answer = tuple[int, dict[str, str], bytes]


class Server:
    """A server on loopback that answers as the test says; remembers what reached it."""

    def __init__(self, answer: Callable[[str, Any], Answer | None]) -> None:
        self.seen: list[tuple[str, str | None, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(None)

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _reply(self, body: Any) -> None:
                outer.seen.append((self.path, self.headers.get("authorization"), body))
                found = answer(self.path, body)
                if found is None:  # the connection ends without a word
                    return
                status, headers, data = found
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str, Any], Answer | None]], Server]]:
    begun: list[Server] = []

    def start(answer: Callable[[str, Any], Answer | None]) -> Server:
        begun.append(Server(answer))
        return begun[-1]

    yield start
    for server in begun:
        server.stop()


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "_BACKOFF_SECONDS", (0.01, 0.02))


def ok(value: Any) -> Answer:
    return 200, {}, json.dumps(value).encode()


def row(label: int, *entries: tuple[int, float], rank: int | None = None, logprob: float = -5.0) -> dict[str, Any]:
    """A row as vLLM writes it: the label first, then ranks 1 to K; one entry where the label is among them."""
    found = {str(label): {"logprob": logprob, "rank": rank or 9, "decoded_token": "x"}}
    for place, (token, value) in enumerate(entries, start=1):
        found[str(token)] = {"logprob": value, "rank": place, "decoded_token": "y"}
    return found


IDS = np.array([5, 7, 8], np.int32)
GOOD: list[Any] = [None, row(7, (1, -0.5), (2, -1.5), (3, -3.0)), row(8, (8, -0.25), (2, -2.0), (4, -4.0))]


def read(found: Any) -> Any:
    """Rows as the teacher parses them."""
    return entries_of(msgspec.convert(found, list[dict[int, Entry] | None] | None, strict=False), IDS, K)


def test_rows_of_a_reply() -> None:
    (token, logprob, rank), wrong = read(GOOD)
    assert wrong == ""
    assert token.tolist() == [[7, 1, 2, 3], [8, 8, 2, 4]]
    assert logprob.tolist() == [[-5.0, -0.5, -1.5, -3.0], [-0.25, -0.25, -2.0, -4.0]]
    assert rank.tolist() == [9, 1]


def test_no_probability_is_minus_infinity() -> None:
    (_, logprob, _), _ = read([None, row(7, (1, 0.0), (2, -9999.0), (3, -9999.0)), GOOD[2]])
    assert logprob[0].tolist() == [-5.0, 0.0, -np.inf, -np.inf]


def changed(**change: Any) -> list[Any]:
    """The good reply with its first row's entry of rank 2 changed."""
    found: list[Any] = json.loads(json.dumps(GOOD))
    found[1]["2"] |= change
    return found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "not null and 2 rows"),
        ([], "not null and 2 rows"),
        (GOOD[:2], "not null and 2 rows"),
        ([*GOOD, GOOD[1]], "not null and 2 rows"),
        (GOOD[1:] + GOOD[:1], "not null and 2 rows"),
        ([None, None, GOOD[2]], "not null and 2 rows"),
        ([None, {}, GOOD[2]], "not null and 2 rows"),
        ([None, row(7, (1, -0.5), (2, -1.5)), GOOD[2]], "a rank or the label is missing"),
        ([None, row(7, (1, -0.5)), GOOD[2]], "2 entries of a row, and 3 were asked for"),
        ([None, row(7, (1, -0.5), (2, -1.5), (3, -3.0), (4, -4.0)), GOOD[2]], "5 entries of a row, and 3"),
        ([None, row(6, (1, -0.5), (2, -1.5), (3, -3.0)), GOOD[2]], "rank 9 of a token that is not in the text"),
        (changed(rank=1), "a rank or the label is missing"),
        (changed(rank=0), "rank 0 of a token that is not in the text"),
        (changed(rank=12), "rank 12 of a token that is not in the text"),
        (changed(rank=1 << 40), "no 32-bit number"),
        ([None, row(7, (1 << 40, -0.5), (2, -1.5), (3, -3.0)), GOOD[2]], "no 32-bit number"),
    ],
)
def test_replies_that_do_not_fit_are_told_apart(found: Any, message: str) -> None:
    entries, wrong = read(found)
    assert entries is None
    assert message in wrong


def teacher_of(server: Server, tokens: int = 20) -> ServerTeacher:
    from xtoken.schemas.manifest import TeacherInfo

    info = TeacherInfo(
        model="toy", backend="server", vocab_rows=tokens, context=64, dtype="unknown", head_dtype="unknown",
        device="unknown", capture_path="server", engine_version="vllm 0",
    )  # fmt: skip
    return ServerTeacher(Client(server.url, patience=2.0), info, "served", K, 4)


def completion(rows: Any) -> Answer:
    return ok({"choices": [{"index": 0, "prompt_logprobs": rows}]})


def test_what_is_asked_and_what_comes_of_it(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    server = serve(lambda *_: completion(GOOD))
    (rows,) = teacher_of(server).rows([IDS])
    assert rows.ids.tolist() == [[1, 2, 3], [8, 2, 4]]
    assert rows.target_logprob.tolist() == [-5.0, -0.25]
    assert rows.target_rank.tolist() == [9, 1]
    (path, key, body) = server.seen[0]
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert body == {
        "model": "served",
        "prompt": [5, 7, 8],
        "add_special_tokens": False,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 3,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([None, row(7, (1, 0.5), (2, -1.5), (3, -3.0)), GOOD[2]], "above 0"),
        ([None, row(7, (1, -0.1), (2, -0.1), (3, -3.0)), GOOD[2]], "mass is above 1"),
        ([None, row(7, (1, -1.5), (2, -0.5), (3, -3.0)), GOOD[2]], "do not descend"),
        ([None, row(7, (1, -0.5), (99, -1.5), (3, -3.0)), GOOD[2]], "outside the vocabulary"),
        ([None, row(7, (1, -0.5), (2, -1.5), (3, -3.0), rank=99), GOOD[2]], "a rank lies outside"),
        (None, "not null and 2 rows"),
        ([None, [1, 2, 3], GOOD[2]], "Expected `object"),
        ([None, {"1": -0.5, "2": -1.5, "3": -3.0}, GOOD[2]], "Expected `object`, got `float`"),
        ([None, {"one": {"logprob": -0.5, "rank": 1}}, GOOD[2]], "Expected `int`, got `str`"),
        (changed(rank=None), "Expected `int`, got `null`"),
        (changed(rank=True), "Expected `int`, got `bool`"),
        (changed(logprob="-1"), "Expected `float`, got `str`"),
        (changed(logprob=None), "Expected `float`, got `null`"),
    ],
)
def test_rows_that_are_no_distribution_are_refused(serve: Any, rows: Any, message: str) -> None:
    with pytest.raises(XtokenError, match=rf"did not answer what was asked \(.*{message}.*--max-logprobs 3 or more"):
        teacher_of(serve(lambda *_: completion(rows))).rows([IDS])


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"choices": []}', b'{"choices": [1]}', b"[" * 100000, b'{"choices": [\xff]}']
)
def test_what_is_no_reply_is_refused(serve: Any, data: bytes) -> None:
    with pytest.raises(
        XtokenError, match=r"did not answer what was asked \((DecodeError|ValidationError|Rec|0 choices)"
    ):
        teacher_of(serve(lambda *_: (200, {}, data))).rows([IDS])


def test_a_reply_without_end_is_refused(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtoken.pipeline.teachers.server_teacher._REPLY_BYTES", 1000)
    with pytest.raises(XtokenError, match="replied with more than"):
        teacher_of(serve(lambda *_: (200, {}, b" " * 100000))).rows([IDS])


def test_a_redirect_is_refused_and_nothing_is_sent_there(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    other = serve(lambda *_: completion(GOOD))
    server = serve(lambda *_: (307, {"location": f"{other.url}/v1/completions"}, b""))
    with pytest.raises(XtokenError, match=f"sends on to {other.url[7:]}, where nothing is sent"):
        teacher_of(server).rows([IDS])
    assert other.seen == []


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_sheds_load_is_asked_again(serve: Any, status: int) -> None:
    answers = iter([(status, {"retry-after": "0"}, b"busy")] * 3)
    server = serve(lambda *_: next(answers, completion(GOOD)))
    assert len(teacher_of(server).rows([IDS])[0].ids) == 2
    assert len(server.seen) == 4


def test_a_request_that_always_fails_is_given_up_while_others_are_served(serve: Any) -> None:
    """Minutes of patience are for a server that is away, not for a prompt that it cannot bear."""
    server = serve(lambda path, _: (500, {}, b"boom") if path == "/bad" else ok({}))
    client = Client(server.url, patience=300)
    ended = threading.Event()

    def others() -> None:
        while not ended.is_set():
            client.ask("/good")

    thread = threading.Thread(target=others)
    thread.start()
    try:
        with pytest.raises(XtokenError, match="serves other requests and answered HTTP 500 to this one 5 times: boom"):
            client.ask("/bad")
    finally:
        ended.set()
        thread.join()


def test_a_connection_that_ends_is_made_again(serve: Any) -> None:
    answers = iter([None, None])
    server = serve(lambda *_: next(answers, completion(GOOD)))
    assert len(teacher_of(server).rows([IDS])[0].ids) == 2
    assert len(server.seen) == 3


def test_a_server_that_stays_away_ends_the_worker(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    server = serve(lambda *_: (503, {}, b"model is loading"))
    client = Client(server.url, patience=0.1)
    with pytest.raises(EngineLost, match=r"out of reach for 0 s \(HTTP 503: model is loading\)") as caught:
        client.ask("/v1/models")
    assert "secret" not in str(caught.value)
    server.stop()
    with pytest.raises(EngineLost, match="ConnectError"):
        Client(server.url, patience=0.1).ask("/v1/models")


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, f"put its key into {KEY}"), (404, "without /v1"), (400, "refuses what it was asked .HTTP 400.: too many")],
)
def test_a_refusal_says_what_to_do(serve: Any, status: int, message: str) -> None:
    with pytest.raises(XtokenError, match=message):
        teacher_of(serve(lambda *_: (status, {}, b"too many"))).rows([IDS])


def test_answers(serve: Any) -> None:
    from xtoken.pipeline.teachers.base import Question

    server = serve(lambda *_: ok({"choices": [{"token_ids": [4, 9]}]}))
    question = Question(IDS, 5, 0.7, 0.9, 11, (9,))
    ((number, ids),) = teacher_of(server).generate([question])
    assert (number, ids.tolist()) == (0, [4, 9])
    body = server.seen[0][2]
    wanted = {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 11, "stop_token_ids": [9]}
    assert {name: body[name] for name in wanted} == wanted
    for bad in ([], [1] * 6, [99], [-1], None, ["4"], [True]):
        with pytest.raises(XtokenError, match="did not answer"):
            list(teacher_of(serve(lambda *_, bad=bad: ok({"choices": [{"token_ids": bad}]}))).generate([question]))


def test_a_compressed_reply_that_is_none_is_refused(serve: Any) -> None:
    with pytest.raises(XtokenError, match="sends what it calls compressed and is not"):
        teacher_of(serve(lambda *_: (200, {"content-encoding": "gzip"}, b"no gzip"))).rows([IDS])


def test_a_certificate_that_nobody_signed_is_refused_at_once(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path / "server.pem")
    listening = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(
        XtokenError, match=r"no certificate that this machine trusts .*; have SSL_CERT_FILE name"
    ) as one:
        Client(f"https://127.0.0.1:{listening.server_port}", patience=300).ask("/version")
    assert not isinstance(one.value, EngineLost)
    listening.shutdown()
    listening.server_close()


def self_signed(path: Path) -> Path:
    """A key and a certificate for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), True)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    signed = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    path.write_bytes(key.private_bytes(*form) + signed)
    return path


def test_a_refusal_ends_what_others_wait_for(serve: Any) -> None:
    """A process ends when its threads do: none may go on asking a server that is away."""
    server = serve(lambda _, body: (503, {}, b"busy") if body["prompt"][0] == 1 else (400, {}, b"no"))
    teacher = teacher_of(server)
    teacher._client._patience = 300
    with pytest.raises(XtokenError, match="refuses what it was asked"):
        teacher.rows([np.array([1, 7, 8], np.int32), IDS])
    teacher._pool.shutdown(wait=True)


def test_vllm_need_not_be_installed_here() -> None:
    code = "import sys; sys.modules['vllm'] = None; import xtoken.pipeline.teachers.server_teacher"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_is_asked_before_a_corpus_is_read(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtoken.pipeline.teachers.server_teacher._IMPATIENCE_SECONDS", 0.1)
    good = serve(lambda *_: ok({"data": [{"id": "t"}]}))
    check_reach(TeacherGroup(teacher="t", backend="server", server=[good.url, good.url]))
    assert [path for path, *_ in good.seen] == ["/v1/models"] * 2
    gone = serve(lambda *_: None)
    gone.stop()
    with pytest.raises(XtokenError, match=r"out of reach for 0 s .*; start 'vllm serve' there, or give --server"):
        check_reach(TeacherGroup(teacher="t", backend="server", server=[good.url, gone.url]))
    with pytest.raises(XtokenError, match="in the clear"):
        check_reach(TeacherGroup(teacher="t", backend="server", server=["http://teacher.example"]))
    check_reach(TeacherGroup(teacher="t", backend="hf"))


def test_each_worker_has_one_of_the_servers() -> None:
    several = TeacherGroup(teacher="t", backend="server", server=["https://a", "https://b"])
    assert [several.of_slot(slot).server for slot in range(3)] == [["https://a"], ["https://b"], ["https://a"]]
    assert not several.takes_gpus


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:word@127.0.0.1:1", r"'127.0.0.1:1' holds a key"),
        ("https://secret@teacher.example", r"'teacher.example' holds a key"),
        ("http://teacher.example:8000", "in the clear"),
        ("http://10.0.0.7:8000", "in the clear"),
        ("teacher.example", "is not an address"),
        ("ftp://teacher.example", "is not an address"),
        ("https://", "is not an address"),
        ("https://teacher.example/?key=secret", "is not an address"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(XtokenError, match=message) as caught:
        origin(url, insecure=False)
    assert "word" not in str(caught.value)


def test_addresses_that_are_taken() -> None:
    for url in (
        "http://127.0.0.1:8000/",
        "http://localhost:8000/v1",
        "http://[::1]:8000",
        "https://teacher.example/v1/",
    ):
        assert not origin(url, insecure=False).endswith(("/", "/v1"))
    assert origin("http://10.0.0.7:8000", insecure=True) == "http://10.0.0.7:8000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "server"}, "needs --server"),
        ({"backend": "hf", "server": ["http://127.0.0.1:1"]}, "--server is for --backend server"),
        ({"backend": "vllm", "served_as": "x"}, "--served-as is for --backend server"),
    ],
)
def test_flags_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherGroup(teacher="t", **options)


def vllm_like(tokenizer: Any, *, served: str = "toy", limit: int = 64, tokens: Any = None, entries: int = 99) -> Any:
    """Answers of a vLLM server with uniform rows."""
    size = tokenizer.table.size

    def answer(path: str, body: Any) -> Answer:
        if path == "/v1/models":
            return ok({"data": [{"id": served, "root": "org/model", "max_model_len": limit}]})
        if path == "/version":
            return ok({"version": "0.32.0"})
        if path == "/tokenize":
            return ok({"tokens": tokens or list(tokenizer.token_ids([body["prompt"]])[0])})
        k, value = min(entries, body["prompt_logprobs"]), -float(np.log(size))
        rows = [
            row(label, *((one, value) for one in range(k)), rank=size, logprob=value) for label in body["prompt"][1:]
        ]
        return completion([None, *rows])

    return answer


@pytest.fixture
def tokenizer_dir(tokenizer_file: Callable[[str], Path]) -> Path:
    return tokenizer_file("smollm2").parent if tokenizer_file("smollm2").is_file() else tokenizer_file("smollm2")


def opened(server: Server, teacher: Path, **options: Any) -> ServerTeacher:
    table = load_tokenizer(str(teacher)).table
    codec = CodecGroup(k=4, max_tokens=options.pop("max_tokens", 32))
    config = TeacherGroup(teacher=str(teacher), backend="server", server=[server.url], **options)
    found = open_teacher(config, codec, table)
    assert isinstance(found, ServerTeacher)
    return found


def test_what_a_server_is_asked_before_it_is_believed(serve: Any, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    good = opened(serve(vllm_like(tokenizer)), tokenizer_dir, served_as="toy")
    assert (good.info.context, good.info.engine_version, good.info.weights_hash) == (64, "vllm 0.32.0", None)
    assert good.settings == {"served_as": "toy", "server": "vllm 0.32.0"}
    with pytest.raises(XtokenError, match="serves 'toy', not "):
        opened(serve(vllm_like(tokenizer)), tokenizer_dir)
    with pytest.raises(XtokenError, match="of --max-model-len 64; use --max-tokens 63"):
        opened(serve(vllm_like(tokenizer)), tokenizer_dir, served_as="toy", max_tokens=64)
    first = list(tokenizer.token_ids(["The"])[0])
    with pytest.raises(XtokenError, match=r"other tokens than the tokenizer of .* \(token 1 is the first"):
        opened(serve(vllm_like(tokenizer, tokens=[*first, 0])), tokenizer_dir, served_as="toy")
    with pytest.raises(XtokenError, match="entries of a row, and 4 were asked for"):
        opened(serve(vllm_like(tokenizer, entries=2)), tokenizer_dir, served_as="toy")


def test_whole_rows_are_not_to_be_had() -> None:
    config = TeacherGroup(teacher="t", backend="server", server=["http://127.0.0.1:1"])
    with pytest.raises(XtokenError, match="--codec sampled needs whole teacher rows, and backend 'server'"):
        check_backend(config, CodecGroup(codec="sampled"))
