"""How throughput grows with workers on Ray, what the driver costs, and what that means for a thousand GPUs.

Workers are real but for their GPU: the engine sleeps for the time that one would take, everything else (tokenizing,
packing, Parquet, checks, commits, leases over Ray) is done. Efficiency is throughput(n) / (n throughput(1)), measured
from two shards after the moment when all workers are open. Several raylets of logical CPUs stand for machines.

    python -m benchmarks.scaling       # about 8 minutes on 2 idle cores; writes results/scaling.{md,json}
    python -m benchmarks.scaling --workers 1,2 --seconds 15 --crowd 100 --out DIR      # a small one
"""

import argparse
import contextlib
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine, machine_line
from benchmarks.scaling_engine import Crowd, SleepingJob, write_rows
from xtoken.pipeline.capture.plan import settle_plan
from xtoken.pipeline.capture.precompute import write_vocab
from xtoken.pipeline.capture.token_codes import corpus_codes
from xtoken.pipeline.capture.worker import open_tokenizer
from xtoken.pipeline.executors.driver import Driver
from xtoken.pipeline.executors.leases import Leases
from xtoken.pipeline.executors.protocol import Event
from xtoken.pipeline.executors.ray_cluster import Share
from xtoken.pipeline.executors.ray_driver import RayExecutor, RayTransport
from xtoken.pipeline.executors.ray_metrics import RayMetrics
from xtoken.pipeline.store.files import Folder, StopRun
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.ui.progress import Silent

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXT = ROOT / "examples" / "data" / "moby-dick.jsonl"
MODEL = ROOT / ".cache" / "models" / "smollm2-135m"
BYTES_PER_TOKEN = 4.2
DOCUMENT_BYTES = 2000
RAYLETS, CROWD_ACTORS = 4, 4
CROWD_SHARD_SECONDS, CROWD_SHARDS = 12.0, 2
START_SECONDS = 45.0  # that the last of many workers may need to open on two cores
TARGET = 0.95
PAPER_GPUS, PAPER_RATE, PAPER_SHARD = 1000, 20_000, 250_000
Figures = dict[str, Any]


class Measured(StopRun):
    """The run was long enough."""


@dataclass
class Recorder:
    """A ``Watch`` that measures for some seconds from when all workers are open (and settled), then ends the run."""

    workers: int
    seconds: float
    settle: float = 0.0
    opened: int = 0
    open_since: float = math.inf
    began: float = math.inf
    cpu: float = 0.0
    busy: Any = None
    parts: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))

    def see(self, event: Event) -> None:
        """See ``Watch``."""
        if event.kind == "opened":
            self.opened += 1
            if self.opened == self.workers:
                self.open_since = time.monotonic()
        elif event.part is not None and self.began < math.inf:
            self.parts[event.worker].append((time.monotonic(), event.part.tokens))
        elif event.kind in ("failed", "died", "lost", "overdue"):
            raise AssertionError(f"{event.kind}: {event.error}")

    def tick(self) -> None:
        """See ``Watch``."""
        now = time.monotonic()
        if self.began == math.inf and now - self.open_since >= self.settle:
            self.began, self.cpu, self.busy = now, time.process_time(), psutil.cpu_times()
        if now - self.began > self.seconds:
            raise Measured("measured")

    def throughput(self) -> float:
        """Tokens per second: each worker's from its first commit to its last."""
        spans = [(sum(tokens for _, tokens in found[1:]), found[-1][0] - found[0][0]) for found in self.parts.values()]
        assert len(spans) == self.workers, f"{self.workers - len(spans)} workers committed nothing; use more --seconds"
        assert all(seconds for _, seconds in spans), "a worker committed one shard only; use more --seconds"
        return sum(tokens / seconds for tokens, seconds in spans)

    def load(self) -> Figures:
        """CPU of the driver and of the machine."""
        wall, driver = time.monotonic() - self.began, time.process_time() - self.cpu
        shards = sum(len(found) for found in self.parts.values())
        return {
            "workers": self.workers,
            "shards": shards,
            "seconds": wall,
            "driver_cpu_share": driver / wall,
            "driver_ms_per_shard": 1e3 * driver / shards,
            "driver_ms_per_worker_second": 1e3 * driver / wall / self.workers,
            "machine_busy": _busy(self.busy),
        }


def _busy(before: Any) -> float:
    """Share of all cores that was not idle since."""
    spent = [now - then for now, then in zip(psutil.cpu_times(), before, strict=True)]
    names = psutil.cpu_times()._fields
    idle = sum(spent[names.index(name)] for name in ("idle", "iowait"))
    guests = sum(spent[names.index(name)] for name in ("guest", "guest_nice") if name in names)
    return 1 - idle / (sum(spent) - guests)


@contextlib.contextmanager
def cluster(cpus: int) -> Iterator[str]:
    """The address of a Ray of several raylets that share so many logical CPUs."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    from ray.cluster_utils import Cluster

    each = math.ceil(cpus / RAYLETS)
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(RAYLETS):
            started.add_node(num_cpus=each, num_gpus=each)  # a GPU is a number here: one worker each
        yield started.address
    finally:
        started.shutdown()


def prepare(folder: Path, rate: float, shard_seconds: float, shards: int) -> PrecomputeConfig:
    """A corpus that is long enough, planned, with rows for the engines to hand out."""
    shard_bytes = int(rate * shard_seconds * BYTES_PER_TOKEN)
    text = "\n".join(json.loads(line)["text"] for line in TEXT.read_text().splitlines())
    pieces = [text[at : at + DOCUMENT_BYTES] for at in range(0, len(text), DOCUMENT_BYTES)]
    with (folder / "corpus.jsonl").open("w") as file:
        for index in range(shards * shard_bytes // DOCUMENT_BYTES):
            file.write(json.dumps({"id": str(index), "text": pieces[index % len(pieces)]}) + "\n")
    config = PrecomputeConfig.from_flat(
        corpus=str(folder / "corpus.jsonl"),
        teacher=str(MODEL),
        backend="fake",
        out=str(folder / "out"),
        shard_bytes=shard_bytes,
        max_tokens=512,
        batch_tokens=512,
        audit="none",
    )
    tokenizer = open_tokenizer(config.teacher)
    write_rows(folder / "rows.npz", config, tokenizer.table)
    return config


def measure(address: str, config: PrecomputeConfig, workers: int, rate: float, seconds: float) -> Figures:
    """One run of so many workers, ended once it is long enough."""
    folder = Folder(f"{config.out}-{workers}")
    folder.make("")
    config = config.model_copy(update={"out": folder.root})
    plan = settle_plan(folder, config.corpus, config.run.shard_bytes, Silent())
    tokenizer = open_tokenizer(config.teacher)
    write_vocab(folder, tokenizer.table, corpus_codes(config.corpus, plan, tokenizer))
    # what was delayed while others were loading would count as speed if it came in at the start
    recorder = Recorder(workers, seconds, settle=2 * config.run.shard_bytes / BYTES_PER_TOKEN / rate)
    job = SleepingJob(config, str(Path(config.corpus.corpus).parent / "rows.npz"), rate)
    with contextlib.suppress(Measured):
        RayExecutor(address, workers, 1.0).run(job, range(len(plan.shards)), recorder)
    rate_found = recorder.throughput()
    return recorder.load() | {"tokens_per_second": rate_found, "engines_busy": rate_found / workers / rate}


@dataclass(frozen=True)
class _Call:
    """One method of one member of a crowd, called as an actor's method is."""

    method: Any
    slot: int

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(self.slot, *arguments)


@dataclass(frozen=True)
class _Handle:
    messages: _Call
    lease: _Call


class CrowdTransport(RayTransport):
    """A transport whose workers are members of a few actors: the driver does all that it does for real ones."""

    def __init__(self, crowds: list[Any], workers: int) -> None:
        super().__init__(None, Share(1, 0.0), workers)
        self._crowds = crowds

    def start_actor(self, slot: int) -> Any:
        """See ``RayTransport``."""
        crowd = self._crowds[slot % len(self._crowds)]
        return _Handle(_Call(crowd.messages, slot), _Call(crowd.lease, slot))


def measure_crowd(address: str, workers: int) -> Figures:
    """What the driver alone costs with so many workers, whose shards take as long as on paper."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 2 * workers}
        actor = ray.remote(Crowd).options(**options)
        crowds = [actor.remote(CROWD_SHARD_SECONDS, PAPER_SHARD) for _ in range(CROWD_ACTORS)]
        # all of them open at once and commit in waves: whole waves are measured
        recorder = Recorder(workers, CROWD_SHARDS * CROWD_SHARD_SECONDS, settle=CROWD_SHARD_SECONDS / 2)
        leases = Leases(range(workers * (CROWD_SHARDS + 10)), 3, recorder.see, math.inf)
        driver = Driver(CrowdTransport(crowds, workers), recorder, leases)
        metrics = RayMetrics(0)
        with contextlib.suppress(Measured):
            while True:
                driver.scale_up()
                driver.turn()
                metrics.tick()
        return recorder.load()
    finally:
        ray.shutdown()


def report(found: list[Figures], crowds: list[Figures], options: argparse.Namespace) -> list[str]:
    """The Markdown."""
    lines = ["# Throughput by workers, and the driver", ""]
    lines += [f"Engines sleep for {options.rate:,.0f} tokens per second each, shards of {options.shard_seconds:g} s;"]
    lines += [f"{RAYLETS} raylets. Steady state: two shards after all workers are open, for {options.seconds:g} s."]
    lines += [f"Made by `python -m benchmarks.scaling` on {machine_line()}.", ""]
    lines += ["| workers | tokens/s | efficiency | engines busy | cores busy | driver, % of a core | ms per shard |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {one['workers']} | {one['tokens_per_second']:,.0f} | {one['efficiency']:.1%} | {one['engines_busy']:.1%} | "
        f"{one['machine_busy']:.0%} | {one['driver_cpu_share']:.1%} | {one['driver_ms_per_shard']:.1f} |"
        for one in found
    ]
    worst = min(one["efficiency"] for one in found)
    lines += ["", f"Target: {TARGET:.0%} at every size; lowest here {worst:.1%}.", ""]
    lines += ["## The driver with many workers", ""]
    lines += [f"Workers that only talk, as much as real ones do with shards of {CROWD_SHARD_SECONDS:g} s.", ""]
    lines += [
        "| workers | shards/s | driver, % of a core | ms per shard | ms per worker and second |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['workers']} | {one['shards'] / one['seconds']:.0f} | {one['driver_cpu_share']:.1%} | "
        f"{one['driver_ms_per_shard']:.2f} | {one['driver_ms_per_worker_second']:.2f} |"
        for one in crowds
    ]
    return [*lines, "", *on_paper(crowds), ""]


def on_paper(crowds: list[Figures]) -> list[str]:
    """What the crowds say about a thousand GPUs."""
    rate = PAPER_GPUS * PAPER_RATE / PAPER_SHARD
    last = crowds[-1]
    near = min(crowds, key=lambda one: abs(one["workers"] - PAPER_GPUS))
    return [
        f"## {PAPER_GPUS:,} GPUs on paper",
        "",
        f"{PAPER_GPUS:,} engines of {PAPER_RATE:,} tokens/s and shards of 1 MiB of text, {PAPER_SHARD:,} tokens,",
        f"commit {rate:.0f} shards per second and take {PAPER_SHARD / PAPER_RATE:.1f} s for each.",
        f"{near['workers']:,} workers at {near['shards'] / near['seconds']:.0f} shards per second cost the driver",
        f"{near['driver_cpu_share']:.0%} of a core, {last['workers']:,} of them {last['driver_cpu_share']:.0%}",
        "(leases, calls and metrics; the log and the status come on top). One driver is enough for them; use",
        "`--cell` where it comes near half a core, where engines are in several clusters or regions, or where the",
        "end of one driver must not stop all of them.",
    ]


def main() -> None:
    """Measure, print, write json and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4,8,16,32")
    parser.add_argument("--rate", type=float, default=2000.0, help="tokens per second of one engine")
    parser.add_argument("--shard-seconds", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of steady state, each size")
    parser.add_argument("--crowd", default="100,1000,2000", help="workers that only talk")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sizes = [int(size) for size in options.workers.split(",")]
    shards = int(max(sizes) * (START_SECONDS + options.seconds) / options.shard_seconds) + 4
    with tempfile.TemporaryDirectory() as folder, cluster(max(sizes)) as address:
        config = prepare(Path(folder), options.rate, options.shard_seconds, shards)
        found = []
        for size in sizes:
            found.append(measure(address, config, size, options.rate, options.seconds))
            alone = found[0]["tokens_per_second"] / found[0]["workers"]
            found[-1]["efficiency"] = found[-1]["tokens_per_second"] / size / alone
            print(json.dumps(found[-1]), flush=True)
        crowds = [measure_crowd(address, int(size)) for size in options.crowd.split(",")]
    text = "\n".join(report(found, crowds, options))
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scaling.md").write_text(text)
    everything = {"machine": machine(), "workers": found, "crowds": crowds, "options": vars(options)}
    (options.out / "scaling.json").write_text(json.dumps(everything, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
