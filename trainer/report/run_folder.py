"""The folder of a run as the report reads it: whatever lies there is checked, since runs travel between people.

Shapes: N optimizer steps, K of them that carry a figure.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.record import METRICS, RUN, identity_of

SUMMARY = "summary.json"
HELD_OUT, COMPLETIONS = "held-out.jsonl", "completions.jsonl"
CURVES = (
    *("tokens_per_s", "lr", "grad_norm", "loss", "kd", "ce", "top1_agreement"),
    *("kd_gradient", "ce_gradient", "kd_weight"),  # under --mix gradmag
    "taught",  # of conversations
)
_LAST = 10  # steps whose mean is a run's final loss, as in summary.json
_LARGEST = 1e60  # beyond what float32 holds; squares of it are still numbers
_WINDOW = re.compile(r"#\d+$")


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out data, ``when`` being before, step or after."""

    when: str
    step: int
    figures: dict[str, float]
    by_source: dict[str, dict[str, float]] = field(default_factory=dict)
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something that happened at a step: rollback, spike, resumed, preempted; ``details`` are plain values."""

    step: int
    name: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    """What a student wrote after a prompt, and what truly follows."""

    when: str
    sample: str
    prompt: str
    completion: str
    text: str


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        root: its folder, as named.
        step_N, tokens_N, seconds_N: float64, of each step; tokens and seconds since the start.
        curves: name -> (rows_K, values_K): at which steps a figure was logged, and its values (NaN where it was none).
        summary: None while the run is not finished.
        documents: held-out document -> bits, bytes after training.
    """

    root: str
    identity: dict[str, Any]
    config: dict[str, Any]
    provenance: dict[str, Any]
    step_N: NDArray[np.float64]
    tokens_N: NDArray[np.float64]
    seconds_N: NDArray[np.float64]
    curves: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]
    evaluations: tuple[Evaluation, ...]
    events: tuple[Event, ...]
    summary: dict[str, Any] | None
    documents: dict[str, tuple[float, float]]
    completions: tuple[Completion, ...]

    @property
    def seed(self) -> int:
        """Its seed; 0 where it has none."""
        return int(self.identity.get("seed", self.config.get("seed", 0)))

    @property
    def losses(self) -> tuple[str, ...]:
        """Its losses, each once."""
        return tuple(dict.fromkeys(self.identity["loss"]))

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        done = self._summed("steps")
        return int(self.step_N[-1]) if len(self.step_N) else int(done)

    @property
    def tokens(self) -> float:
        """Student tokens trained on."""
        return float(self.tokens_N[-1]) if len(self.tokens_N) else self._summed("tokens")

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return float(self.seconds_N[-1]) if len(self.seconds_N) else self._summed("seconds")

    def _summed(self, name: str) -> float:
        return 0.0 if self.summary is None else number(self.summary.get(name, 0), f"{self.root}/{SUMMARY}, {name}")

    def final(self, name: str) -> float | None:
        """Mean of a figure of steps, such as ``loss``, ``kd`` or ``ce``, over the last ten that logged it."""
        if name in self.curves:
            return float(self.curves[name][1][-_LAST:].mean())
        if self.summary is None or name not in self.summary:
            return None
        return number(self.summary[name], f"{self.root}/{SUMMARY}, {name}")

    def evaluation(self, when: str) -> Evaluation | None:
        """The last evaluation ``before`` or ``after``; ``latest`` is the last one made once training began."""
        wanted = {"latest": ("step", "after")}.get(when, (when,))
        matching = [one for one in self.evaluations if one.when in wanted]
        return matching[-1] if matching else None

    def at(self, step: int) -> tuple[float, float]:
        """Tokens and seconds at the end of a step."""
        row = int(np.searchsorted(self.step_N, step, side="right")) - 1
        return (0.0, 0.0) if row < 0 else (float(self.tokens_N[row]), float(self.seconds_N[row]))


def read_run(root: str) -> RunRecord:
    """Read a folder of ``xtoken train``, finished or not; lines of metrics of a kind not known here are left out.

    Raises:
        XtokenError: it is not a training run, or a file of it holds what no run writes.
    """
    if "://" in root:
        raise XtokenError(f"{root} is a URL; the report reads local folders, copy the run from there")
    folder = Path(root)
    run = _object(folder / RUN)
    identity = identity_of(run)
    if identity is None:
        raise XtokenError(
            f"{root} is not a training run: {'its' if run is not None else 'it has no'} {RUN}"
            f"{' names no loss' if run is not None else ''}; name a folder that 'xtoken train' wrote"
        )
    for loss in identity["loss"]:
        if not isinstance(loss, str) or loss not in LOSSES:
            raise _wrong(f"{folder / RUN}, loss", loss, f"one of {', '.join(LOSSES)}")
    config = mapping(run.get("config", {}), f"{folder / RUN}, config") if run else {}
    seed = identity.get("seed", config.get("seed", 0))
    if type(seed) is not int:
        raise _wrong(f"{folder / RUN}, seed", seed, "a whole number")
    provenance = {k: v for k, v in (run or {}).items() if k not in ("identity", "config", "run_hash", "targets")}
    summary = _object(folder / SUMMARY)
    return RunRecord(
        root=root,
        identity=identity,
        config=config,
        provenance=provenance,
        summary=summary,
        documents=_documents(folder / HELD_OUT),
        completions=tuple(_completions(folder / COMPLETIONS)),
        **_metrics(folder, summary),
    )


def _metrics(folder: Path, summary: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of a ``RunRecord`` that metrics.jsonl holds; a step that was made twice counts as last made."""
    steps: dict[int, tuple[dict[str, Any], str]] = {}
    evaluations: list[Evaluation] = []
    events: list[Event] = []
    for line, where in _lines(folder / METRICS):
        if "eval" in line:
            evaluations.append(_evaluation(line, where))
        elif "event" in line:
            details = {k: v for k, v in line.items() if k not in ("step", "event")}
            events.append(Event(_step(line, where), _text(line["event"], f"{where}, event"), details))
        elif "loss" in line:
            steps[_step(line, where)] = (line, where)
    for when in ("before", "after"):
        if summary is not None and when in summary and not any(one.when == when for one in evaluations):
            where = f"{folder / SUMMARY}, {when}"
            last = max(steps, default=0) if when == "after" else 0
            evaluations.append(_evaluation({**mapping(summary[when], where), "eval": when, "step": last}, where))
    ordered = [steps[step] for step in sorted(steps)]
    tokens_N = _floats([number(line.get("tokens", 0), f"{where}, tokens") for line, where in ordered])
    seconds_N = _floats([number(line.get("seconds", 0), f"{where}, seconds") for line, where in ordered])
    return {
        "step_N": _floats(sorted(steps)),
        "tokens_N": np.maximum.accumulate(np.nan_to_num(tokens_N, posinf=0.0, neginf=0.0)),
        "seconds_N": np.nan_to_num(seconds_N, posinf=0.0, neginf=0.0).clip(0).cumsum(),
        "curves": dict(_curves(ordered)),
        "evaluations": tuple(evaluations),
        "events": tuple(events),
    }


def _curves(
    ordered: list[tuple[dict[str, Any], str]],
) -> Iterator[tuple[str, tuple[NDArray[np.int64], NDArray[np.float64]]]]:
    for name in CURVES:
        lines = [(row, line[name], where) for row, (line, where) in enumerate(ordered) if name in line]
        if lines:
            values = _floats([number(value, f"{where}, {name}") for _, value, where in lines])
            yield name, (np.array([row for row, _, _ in lines], np.int64), values)


def _evaluation(line: dict[str, Any], where: str) -> Evaluation:
    nested = {
        name: {
            key: {k: number(v, f"{where}, {name}") for k, v in mapping(row, f"{where}, {name}").items()}
            for key, row in mapping(line.get(name, {}), f"{where}, {name}").items()
        }
        for name in ("by_source", "by_kind", "by_category")
    }
    plain = ("bits_per_byte", "bytes", "kl", "top1_agreement", "chunks", "teacher_bits_per_byte")
    figures = {name: number(line[name], f"{where}, {name}") for name in plain if line.get(name) is not None}
    return Evaluation(_text(line["eval"], f"{where}, eval"), _step(line, where), figures, **nested)


def _documents(path: Path) -> dict[str, tuple[float, float]]:
    """Windows of a document count as one: they are not independent of each other."""
    sums: dict[str, tuple[float, float]] = {}
    for line, where in _lines(path):
        if _text(line.get("when"), f"{where}, when") == "after":
            name = _WINDOW.sub("", _text(line.get("id"), f"{where}, id"))
            bits, size = (number(line.get(part), f"{where}, {part}") for part in ("bits", "bytes"))
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + bits, before[1] + size)
    return {name: (bits, size) for name, (bits, size) in sums.items() if size > 0 and math.isfinite(bits + size)}


def _completions(path: Path) -> Iterator[Completion]:
    for line, where in _lines(path):
        when, sample, prompt, completion, text = (
            _text(line.get(name, ""), f"{where}, {name}") for name in ("when", "id", "prompt", "completion", "text")
        )
        yield Completion(when, sample, prompt, completion, text)


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects of a JSON lines file, each with its place for messages; nothing where there is no such file.

    The last line may be torn by a crash, and is then left out.
    """
    data = _read(path)
    if data is None:
        return
    for at, text in enumerate(data.split(b"\n")[:-1], 1):
        where = f"{path}, line {at}"
        if text.strip():
            yield mapping(_parse(text, where), where), where


def _object(path: Path) -> dict[str, Any] | None:
    data = _read(path)
    return None if data is None else mapping(_parse(data, str(path)), str(path))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise XtokenError(f"{path} cannot be read ({error}); copy the run again") from error


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise XtokenError(f"{where} is not JSON ({str(error)[:200]}); copy the run again") from error


def _step(line: dict[str, Any], where: str) -> int:
    step = line.get("step")
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise _wrong(f"{where}, step", step, "a whole number of at least 0")
    return step


def number(value: Any, where: str) -> float:
    """A JSON number; null is NaN.

    Raises:
        XtokenError: it is something else.
    """
    if value is None:
        return math.nan
    if type(value) is float and not math.isfinite(value):
        return value
    if type(value) in (int, float) and abs(value) <= _LARGEST:
        return float(value)
    raise _wrong(where, value, f"a number of at most {_LARGEST:g}")


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        XtokenError: it is something else.
    """
    if isinstance(value, dict):
        return value
    raise _wrong(where, value, "an object")


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise _wrong(where, value, "text")


def _wrong(where: str, value: Any, wanted: str) -> XtokenError:
    return XtokenError(
        f"{where} is {ascii(value)[:60]}, not {wanted}; 'xtoken train' did not write that, copy the run again"
    )


def _floats(values: list[Any]) -> NDArray[np.float64]:
    return np.array(values, np.float64)
