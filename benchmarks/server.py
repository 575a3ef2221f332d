"""What rows by HTTP cost the client's CPU, beside rows of an engine in the same process.

python -m benchmarks.server [--write]

A server of canned replies in another process stands for vLLM's, so that its model takes no time: a reply as vLLM writes
one, K entries and the label of each token. The client parses, checks and arranges; the rows in process begin with
the tensors that vLLM hands over. CPU seconds are those of this process, all threads.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, machine_line
from xtoken.pipeline.teachers.server_client import Client
from xtoken.pipeline.teachers.server_teacher import ServerTeacher
from xtoken.pipeline.teachers.vllm_replies import TensorRows, read_entries
from xtoken.pipeline.teachers.vllm_teacher import rows_from
from xtoken.schemas.manifest import TeacherInfo

K, TOKENS, SAMPLES, VOCABULARY, ROUNDS = 32, 1024, 32, 151_936, 7
RESULTS = Path(__file__).parent / "results"


def rows(seed: int) -> tuple[Any, Any, Any, Any]:
    """Ids of a prompt, and random rows as vLLM's tensors: [R, K + 1] ids and log-probabilities, [R] ranks."""
    rng = np.random.default_rng(seed)
    half = VOCABULARY // 2  # labels from the first, entries from the second: no label is an entry
    prompt = rng.integers(0, half, TOKENS).astype(np.int32)
    ids = half + np.stack([rng.choice(half, K, replace=False) for _ in range(TOKENS - 1)]).astype(np.int32)
    logprob = -np.sort(rng.uniform(0.7, 12, (TOKENS - 1, K))).astype(np.float32) - np.float32(3)
    label = np.full((TOKENS - 1, 1), -15, np.float32)
    return (
        prompt,
        np.concatenate([prompt[1:, None], ids], 1),
        np.concatenate([label, logprob], 1),
        np.full(TOKENS - 1, 9999, np.int32),
    )


def reply(ids: Any, logprob: Any, rank: Any) -> bytes:
    """The same as vLLM's server writes it."""
    found: list[Any] = [None]
    for row in range(len(ids)):
        ranks = [int(rank[row]), *range(1, K + 1)]
        triples = zip(ids[row].tolist(), logprob[row].tolist(), ranks, strict=True)
        found.append({str(i): {"logprob": p, "rank": r, "decoded_token": " word"} for i, p, r in triples})
    return json.dumps({"choices": [{"index": 0, "text": "", "prompt_logprobs": found}]}, separators=(",", ":")).encode()


def serve(replies: dict[int, bytes], port: Any) -> None:
    """Answer by the first token of the prompt."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            data = replies[body["prompt"][0]]
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.put(server.server_port)
    server.serve_forever()


def main() -> None:
    """Measure, print, and write results with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    made = [rows(seed) for seed in range(SAMPLES)]
    for number, (prompt, ids, *_) in enumerate(made):
        prompt[0] = number
        ids[:, 0] = prompt[1:]
    replies = {int(prompt[0]): reply(ids, logprob, rank) for prompt, ids, logprob, rank in made}
    port: Any = multiprocessing.Queue()
    process = multiprocessing.Process(target=serve, args=(replies, port), daemon=True)
    process.start()
    info = TeacherInfo(
        model="m", backend="server", vocab_rows=VOCABULARY, context=1 << 20, dtype="unknown", head_dtype="unknown",
        device="unknown", capture_path="server", engine_version="canned",
    )  # fmt: skip
    teacher = ServerTeacher(Client(f"http://127.0.0.1:{port.get()}"), info, "m", K, 16)
    prompts = [prompt for prompt, *_ in made]

    def by_server() -> None:
        teacher.rows(prompts)

    def in_process() -> None:
        for prompt, ids, logprob, rank in made:
            kept = TensorRows()
            kept.append((ids, logprob, rank))
            found = read_entries(kept, TOKENS - 1, K)
            assert found is not None
            assert rows_from(prompt, found, VOCABULARY)[1] == 0

    costs: dict[str, list[float]] = {"server": [], "in process": []}
    for _ in range(ROUNDS + 1):
        for name, work in (("server", by_server), ("in process", in_process)):
            began = time.process_time()
            work()
            costs[name].append((time.process_time() - began) / (SAMPLES * TOKENS) * 1e6)
    process.terminate()
    median = {name: statistics.median(found[1:]) for name, found in costs.items()}  # the first compiles
    size = statistics.mean(len(data) for data in replies.values()) / TOKENS
    lines = [
        "# Rows from a server: the client's CPU",
        "",
        f"K = {K}, {SAMPLES} prompts of {TOKENS} tokens, medians of {ROUNDS}. {machine_line()}",
        "",
        "| rows | microseconds of CPU a token | tokens per CPU second | bytes on the wire a token |",
        "|---|---:|---:|---:|",
        f"| by HTTP, as JSON | {median['server']:.1f} | {1e6 / median['server']:,.0f} | {size:,.0f} |",
        f"| of an engine in the process | {median['in process']:.2f} | {1e6 / median['in process']:,.0f} | |",
        "",
        f"By HTTP a token costs {median['server'] / median['in process']:.0f} times as much, nearly all of it JSON.",
        "",
    ]
    print("\n".join(lines))
    if options.write:
        (RESULTS / "server.md").write_text("\n".join(lines))
        figures = {"machine": machine(), "k": K, "microseconds": median, "bytes_per_token": size}
        (RESULTS / "server.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
