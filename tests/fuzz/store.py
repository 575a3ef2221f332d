"""Feed damaged and hostile captures and targets to everything that reads them; every outcome must be success or an
XtokenError. ``python -m tests.fuzz.store --cases 12000`` writes benchmarks/results/fuzz.json and fuzz.md.

A finding is: another exception, a crash, more than SECONDS, more than MEMORY of growth, or a file outside the folders
given. Cases run in worker processes; what a case does follows from the seed and its number alone.
"""

import argparse
import hashlib
import io
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from . import bombs, mutations
from .mutations import Mutate

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "captures"
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 20.0  # of the processor: two or three are real
STARTUP = 900.0  # imports, and compiled loops where no cache holds them
MEMORY = 3 << 30  # the bound of a row group is 1 GiB decoded, and a copy of it
SEED = 20260
MUTATIONS: dict[str, Mutate] = {
    "manifest values": mutations.manifest_values,
    "manifest text": mutations.manifest_bytes,
    "commit records": mutations.commit_records,
    "links": mutations.links,
    "Parquet bytes": mutations.parquet_bytes,
    "Parquet footer": mutations.parquet_footer,
    "Parquet pages": mutations.parquet_pages,
    "columns": mutations.columns,
    "values": mutations.values,
    "bombs: zeros": bombs.zeros,
    "bombs: strings": bombs.strings,
    "bombs: claims": bombs.claims,
    "bombs: row groups": bombs.groups,
}
# Out of 100 cases; what finds most, most often.
SHARES = [18, 4, 4, 4, 12, 12, 8, 12, 18, 2, 1, 3, 2]
SEALED = {"Parquet bytes", "Parquet footer", "Parquet pages", "columns", "values"} | {
    name for name in MUTATIONS if name.startswith("bombs")
}


def plan(number: int, seed: int = SEED) -> tuple[str, str, np.random.Generator]:
    """Mutation, golden folder and random generator of a case."""
    rng = np.random.default_rng([seed, number])
    name = rng.choice(list(MUTATIONS), p=np.array(SHARES) / sum(SHARES))
    bases = sorted(path.name for path in GOLDEN.glob("v*") if path.is_dir())
    return str(name), str(rng.choice(bases)), rng


def _vocabulary_hash(root: Path, manifest: dict[str, Any]) -> str | None:
    """What the vocabulary tables hash to; None where they cannot be read (or are of targets)."""
    import pyarrow.parquet as pq

    from xtoken.pipeline.tokens import TokenTable

    if manifest.get("kind") != "capture":
        return None
    try:
        rows = pq.read_table(root / "vocab.parquet").sort_by("token_id")
        merges = pq.read_table(root / "merges.parquet")
        pairs = np.stack([merges["left"].to_numpy(), merges["right"].to_numpy()], axis=1).astype(np.int32)
        columns = [rows[name].to_pylist() for name in ("bytes", "role", "byte_fallback")]
        manifest["tokenizer"]["size"] = len(rows)
        return TokenTable.build(*columns, pairs, name="tiny", kind="byte-level").info.hash
    except Exception:  # the damage is the point
        return None


def make_case(number: int, work: Path, seed: int = SEED) -> Path:
    """Write the folder of a case below ``work``."""
    name, base, rng = plan(number, seed)
    root = work / "dataset"
    shutil.copytree(GOLDEN / base, root)
    (work / "secret.json").write_text('{"secret": "do not read this"}')
    MUTATIONS[name](root, rng)
    if name in SEALED and rng.integers(10):
        mutations.seal(root, _vocabulary_hash)
    if rng.integers(20):
        mutations.seal_sums(root)
    return root


# --- what reads a dataset ---------------------------------------------------------------------------------------------


def _inspect(root: str, _out: str) -> None:
    from rich.console import Console

    from xtoken.pipeline.store.inspect import inspect
    from xtoken.schemas.ui.tables import figure_tables

    found = inspect(root)
    json.dumps(found, default=str).encode()
    Console(file=io.StringIO()).print(*figure_tables(found), sep="\n")


def _verify(root: str, _out: str) -> None:
    from xtoken.pipeline.store.verify import verify

    verify(root)


def _drain(root: str, _out: str) -> None:
    from xtoken.pipeline.store.reader import iter_capture

    for batch in iter_capture(root):
        batch.validate(full=True)


def _vocab(root: str, _out: str) -> None:
    from xtoken.pipeline.store.reader import load_vocab

    load_vocab(root).by_bytes()


class _Quiet:
    """A LocalExecutor without processes."""

    def __init__(self, _workers: int) -> None:
        pass

    def run(self, job: Any, shards: list[int], watch: Any) -> dict[int, str]:
        """One part, without attempts."""
        from xtoken.pipeline.executors.protocol import Event

        worker = job.open()
        for shard in shards:
            watch.see(Event("part", shard=shard, part=worker.run(shard, 1)))
        return {}


def _align(root: str, out: str) -> None:
    import xtoken.pipeline.align.run as stage
    from xtoken.schemas.configs.artifacts import AlignConfig
    from xtoken.schemas.manifest import CaptureManifest, read_manifest
    from xtoken.schemas.ui.progress import Silent

    stage.LocalExecutor = _Quiet  # type: ignore[assignment,misc]
    codec = read_manifest(root, CaptureManifest).codec
    losses = ["p-kl", "alm"] if codec.name == "sampled" else ["p-kl", "h-kl", "uld", "alm", "byte-prefix"]
    stage.align(AlignConfig(captures=[root], student="bytes", out=f"{out}/targets", losses=losses), Silent())


def _train(root: str, _out: str) -> None:
    """Open targets, read every row group, build samples and score them with a tiny student."""
    import torch

    from xtoken.trainer.data.micro_batch import split_micros
    from xtoken.trainer.data.samples import Layout, context_token, read_sample
    from xtoken.trainer.data.targets import Targets
    from xtoken.trainer.losses import open_loss
    from xtoken.trainer.losses.base import LossSetup
    from xtoken.trainer.score import measure

    targets = Targets(root)
    info = targets.manifest.student
    sizes = info.size, targets.manifest.teacher_tokenizer.size
    setup = LossSetup(targets.w, targets.vocab, *sizes, torch.device("cpu"), tau=targets.manifest.tau)
    for name in targets.manifest.losses:
        loss = open_loss(name, setup)
        layout = Layout(context_token(info), 512, info.size, (loss,))
        for group in targets.groups[:TRAINED]:
            read = targets.read(group, layout.columns(0))
            samples = [read_sample([(read, row)], layout) for row in range(group.rows)]
            for micro in split_micros(samples, 2048, [loss]):
                measure(_student(info.size), micro, [loss])


def _student(size: int) -> Any:
    """Flat logits, whatever it reads."""
    import torch

    from xtoken.trainer.objective import Student
    from xtoken.trainer.student.head import Head

    class Flat(Head):
        def states(self, input_BL: Any, position_BL: Any, segments: Any = None) -> Any:  # noqa: ARG002
            return torch.zeros(*input_BL.shape, size)

    return Student(None, torch.device("cpu"), None, size, Flat(None, fusable=False, positions=False))


def _pull(root: str, out: str) -> None:
    from xtoken.pipeline.share.push_pull import pull
    from xtoken.schemas.configs.share import PullConfig
    from xtoken.schemas.ui.progress import Bars

    pull(PullConfig(source=root, destination=f"{out}/pulled"), Bars(True))


def _pull_some(root: str, out: str) -> None:
    from xtoken.pipeline.share.push_pull import pull
    from xtoken.schemas.configs.share import PullConfig
    from xtoken.schemas.ui.progress import Bars

    config = PullConfig(source=root, destination=f"{out}/some", parts="0", where="length(sample_id) > 0")
    pull(config, Bars(True))


Consumer = Callable[[str, str], None]
CONSUMERS: dict[str, dict[str, Consumer]] = {
    "capture": {
        "verify": _verify,
        "inspect": _inspect,
        "iter_capture": _drain,
        "load_vocab": _vocab,
        "align": _align,
        "pull": _pull,
        "pull a subset": _pull_some,
    },
    "targets": {"verify": _verify, "inspect": _inspect, "train": _train, "pull": _pull, "pull a subset": _pull_some},
}


# Half of a case's time is theirs, and what they open first are files that the others have been through.
TRAINED = 200  # row groups: opening a file of thousands for each of them takes minutes and harms nobody
SLOW, SLOW_EVERY = ("align", "train", "pull a subset"), 3


def _listing(work: Path) -> set[str]:
    return {path.relative_to(work).as_posix() for path in work.iterdir()}


def _outside(work: Path, out: Path) -> str | None:
    """What is wrong with the files that readers wrote, if anything is."""
    if _listing(work) - {"dataset", "out", "secret.json", "secret-copy"}:
        return f"wrote {_listing(work)}"
    for path in out.rglob("*"):
        if path.is_symlink() or (path.is_file() and b"do not read this" in path.read_bytes()):
            return f"{path.relative_to(out)} is a link or holds what lies outside"
    return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> int:
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def run_case(number: int, work: Path, seed: int = SEED) -> dict[str, Any]:
    """Outcome of every reader: ``ok``, ``refused``, or the finding."""
    from xtoken.schemas.errors import XtokenError

    name, base, _ = plan(number, seed)
    outcomes: dict[str, str] = {}
    root, out = make_case(number, work, seed), work / "out"
    out.mkdir()
    before, began = _reset_peak(), time.monotonic()
    for reader, consume in CONSUMERS["targets" if "targets" in base else "capture"].items():
        if reader in SLOW and number % SLOW_EVERY:
            continue
        started = time.process_time()
        try:
            consume(str(root), str(out))
            outcomes[reader] = "ok"
        except XtokenError:
            outcomes[reader] = "refused"
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fuzz" not in frame.filename]
            at = "; ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
            outcomes[reader] = f"{type(error).__name__} at {at}: {str(error)[:200]}"
        if (seconds := time.process_time() - started) > SECONDS:
            outcomes[reader] = f"hang: {seconds:.1f} s, {outcomes[reader]}"
        if (growth := _status("VmHWM") - before) > MEMORY:
            outcomes[reader] = f"memory: {growth >> 20} MiB, {outcomes[reader]}"
            before = _reset_peak()
    wrong = _outside(work, out)
    if wrong:
        outcomes["files"] = wrong
    growth = _status("VmHWM") - before
    return {
        "case": number,
        "class": name,
        "base": base,
        "outcomes": outcomes,
        "growth": growth,
        "s": time.monotonic() - began,
    }


# --- workers ----------------------------------------------------------------------------------------------------------


def _worker(seed: int, numbers: list[int]) -> None:
    """Run cases and write a line of JSON before and after each."""
    import resource

    from xtoken.pipeline.store.verify import verify

    for name in ("v1-topk", "v2-targets"):  # imports and compiled loops belong to no case
        verify(str(GOLDEN / name))
        with tempfile.TemporaryDirectory() as warm:
            (_align if name == "v1-topk" else _train)(str(GOLDEN / name), warm)
    limit = _status("VmSize") + (12 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in numbers:
        sys.stdout.write(json.dumps({"begin": number}) + "\n")
        sys.stdout.flush()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
            found = run_case(number, Path(work), seed)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


class _Lines:
    """Lines of a process, with a time limit for each."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._fill, args=(process,), daemon=True).start()

    def _fill(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def next(self, seconds: float) -> str | None:
        """The next line; None at the end, queue.Empty when nothing comes."""
        return self._queue.get(timeout=seconds)


def _tell(record: dict[str, Any]) -> None:
    for case, name, reader, outcome in findings([record]):
        print(f"case {case} ({name}, {record['base']}), {reader}: {outcome}", file=sys.stderr, flush=True)


def _drive(seed: int, numbers: list[int], found: list[dict[str, Any]]) -> None:
    """Run cases in a worker process, and the rest in another where one crashes or hangs."""
    left = list(numbers)
    while left:
        command = [sys.executable, "-m", "tests.fuzz.store", "--seed", str(seed), "--worker", "-"]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(left))
        process.stdin.close()
        lines, current, begun = _Lines(process), None, False
        what = "crash"
        try:
            while (line := lines.next(8 * SECONDS if begun else STARTUP)) is not None:
                record, begun = json.loads(line), True
                if "begin" in record:
                    current = record["begin"]
                else:
                    found.append(record)
                    _tell(record)
                    left.remove(record["case"])
                    current = None
        except queue.Empty:
            what = "hang"
            process.kill()
        code = process.wait()
        if current is None and left:
            raise RuntimeError(f"a worker ended with {code} between two cases; run one with --case {left[0]}")
        if left:
            lost = current
            left.remove(lost)
            name, base, _ = plan(lost, seed)
            outcomes = {"process": f"{what} (exit {code})"}
            found.append({"case": lost, "class": name, "base": base, "outcomes": outcomes, "growth": 0, "s": 0})
            _tell(found[-1])


def run_all(seed: int, numbers: list[int], workers: int) -> list[dict[str, Any]]:
    """Outcomes of cases in order of their numbers."""
    found: list[dict[str, Any]] = []
    shares = [numbers[start::workers] for start in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(_drive, seed, share, found) for share in shares]:
            done.result()
    return sorted(found, key=lambda record: int(record["case"]))


def findings(records: list[dict[str, Any]]) -> list[tuple[int, str, str, str]]:
    """(case, class, reader, what) of every outcome that is neither success nor a refusal."""
    return [
        (record["case"], record["class"], reader, outcome)
        for record in records
        for reader, outcome in record["outcomes"].items()
        if outcome not in ("ok", "refused")
    ]


def _goldens() -> dict[str, str]:
    """Start of the sha256 of each golden's manifest."""
    folders = sorted(path for path in GOLDEN.glob("v*") if path.is_dir())
    return {path.name: hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()[:12] for path in folders}


def report(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What is committed: counts per class, findings, peaks, seed and versions."""
    from benchmarks.machine import machine

    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        row = rows[record["class"]]
        outcomes = record["outcomes"].values()
        row["cases"] += 1
        row["all succeed"] += all(outcome == "ok" for outcome in outcomes)
        row["some refuse"] += any(outcome == "refused" for outcome in outcomes)
        row["findings"] += any(outcome not in ("ok", "refused") for outcome in outcomes)
        row["peak growth MiB"] = max(row["peak growth MiB"], record["growth"] >> 20)
        row["slowest ms"] = max(row["slowest ms"], round(record["s"] * 1000))
    readers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for reader, outcome in record["outcomes"].items():
            readers[reader][outcome if outcome in ("ok", "refused") else "finding"] += 1
    return {
        "seed": seed,
        "cases": len(records),
        "bounds": {"seconds": SECONDS, "memory_bytes": MEMORY},
        "classes": {name: dict(rows[name]) for name in MUTATIONS if name in rows},
        "readers": {name: dict(counts) for name, counts in sorted(readers.items())},
        "findings": findings(records)[:200],
        "goldens": _goldens(),
        "machine": machine(),
    }


def _markdown(found: dict[str, Any]) -> str:
    from benchmarks.machine import machine_line

    names = ["cases", "all succeed", "some refuse", "findings", "peak growth MiB", "slowest ms"]
    lines = [
        "# Hostile datasets",
        "",
        f"{found['cases']} mutated captures and targets, seed {found['seed']}, fed to every reader "
        f"({', '.join(SLOW)}: to every {SLOW_EVERY}rd case). A finding is another "
        "exception than XtokenError, a crash of the interpreter, "
        f"more than {SECONDS:g} s, more than {MEMORY >> 20} MiB of growth, or a file outside the folders given.",
        "",
        "| mutation | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {name} | " + " | ".join(str(row.get(column, 0)) for column in names) + " |"
            for name, row in found["classes"].items()
        ),
        "",
        "| reader | ok | refused | findings |",
        "|---|---|---|---|",
        *(
            f"| {name} | {row.get('ok', 0)} | {row.get('refused', 0)} | {row.get('finding', 0)} |"
            for name, row in found["readers"].items()
        ),
        "",
        f"`python -m tests.fuzz.store --cases {found['cases']}`; {machine_line()}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run cases and write the results, or one case in this process, or be a worker."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", type=int, help="run one case here and print it; --keep copies its folder")
    parser.add_argument("--keep")
    parser.add_argument("--worker")
    parser.add_argument("--no-results", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONHASHSEED", "0")
    if args.worker:
        _worker(args.seed, json.loads(sys.stdin.read()))
        return
    if args.case is not None:
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(run_case(args.case, Path(work), args.seed), indent=1))
            if args.keep:
                shutil.copytree(Path(work) / "dataset", args.keep, symlinks=True)
        return
    records = run_all(args.seed, list(range(args.first, args.first + args.cases)), args.workers)
    found = report(records, args.seed)
    grouped = Counter((reader, outcome.split(": ")[0]) for _, _, reader, outcome in findings(records))
    examples = {
        (reader, outcome.split(": ")[0]): (case, name, outcome) for case, name, reader, outcome in findings(records)
    }
    for key, count in grouped.most_common():
        print(count, key[0], "|", *examples[key])
    print(json.dumps(found["classes"], indent=1))
    if not args.no_results:
        (RESULTS / "fuzz.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "fuzz.md").write_text(_markdown(found))


if __name__ == "__main__":
    main()
