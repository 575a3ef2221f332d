"""The folder of a run: run.json says what it is, so that a rerun resumes it and another run is refused."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtoken.schemas.configs.identity import defaults, differences, identity
from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.atomic import write_text
from xtoken.schemas.manifest import TokenizerInfo, digest, provenance
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.lock import LOCK
from xtoken.trainer.ranks import Ranks, device_name
from xtoken.trainer.record import CHECKPOINTS, METRICS, RUN, identity_of, lacking, parsed

SUMMARY = "summary.json"
_BARE = {LOCK, f".{RUN}.tmp"}  # what a run that was killed at once leaves
# What else may lie there, by a file of it, the first that fits.
_KINDS = {
    "align.json": "a folder of targets",
    "student_vocab.parquet": "a folder of targets",
    "w.parquet": "a projection",
    "plan.json": "a capture",
    "merges.parquet": "a capture",
    "config.json": "a model",
}


def refuse_foreign(out: str) -> None:
    """Raise XtokenError where ``out`` is not a local folder, or one that holds something else than a run."""
    if "://" in out:
        raise XtokenError(f"out={out!r} is a URL; training writes to a local folder, copy it from there")
    root = Path(out)
    if not root.exists():
        return
    if not root.is_dir():
        raise XtokenError(f"{root} exists and is not a training run; use another --out")
    names = {path.name for path in root.iterdir()}
    record = parsed((root / RUN).read_bytes()) if RUN in names else None
    if names <= _BARE or identity_of(record) is not None:
        return
    kind = "a capture" if isinstance(record, dict) and "tokenizer_hash" in record else _kind(names)
    if kind is not None:
        raise XtokenError(f"{root} is {kind}; use another --out")
    if RUN not in names or (record is not None and not names & {CHECKPOINTS, METRICS}):
        raise XtokenError(f"{root} exists and is not a training run; use another --out")
    raise XtokenError(f"{root / RUN} is damaged: it names no run; {_mend(names)}")


def _kind(names: set[str]) -> str | None:
    return next((kind for name, kind in _KINDS.items() if name in names), None)


def _mend(names: set[str]) -> str:
    if names <= {RUN, *_BARE}:
        return "remove it and run the same command again"
    return (
        "put a copy of it there and run the same command again, which goes on (the same command with another --out "
        "writes the same one as it starts)"
    )


class Run:
    """``config.out``, opened: new, or the same run as before.

    Attributes:
        streams: shares of the data (see ``TrainConfig.streams``), as the run began with.

    Raises:
        XtokenError: the folder is a URL, or holds something else.
    """

    def __init__(self, config: TrainConfig, targets: Sequence[Targets], tokenizer: TokenizerInfo, ranks: Ranks) -> None:
        refuse_foreign(config.out)
        self.root = Path(config.out)
        self.checkpoints = self.root / CHECKPOINTS
        self.model, self.metrics = self.root / "model", self.root / METRICS
        self.rehearsal = self.root / ".model.rehearsal"
        record = parsed((self.root / RUN).read_bytes()) if (self.root / RUN).exists() else None
        begun = record is not None and _begun(self.root)
        self.streams = config.data.streams or (_streams(record) if record is not None and begun else 0) or ranks.size
        if self.streams % ranks.size:
            raise XtokenError(
                f"{self.streams} streams cannot be dealt to {ranks.size} ranks evenly; start a divisor of "
                f"{self.streams} processes, or another run with --streams a multiple of the ranks"
            )
        now = _identity(config, targets, tokenizer, self.streams)
        if record is not None and begun:
            self._same(record, now, type(config))
        elif ranks.first:
            self._create(now, config, targets, ranks)

    def _create(self, now: dict[str, Any], config: TrainConfig, targets: Sequence[Targets], ranks: Ranks) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        made: dict[str, Any] = {
            "identity": now,
            "run_hash": digest(now),
            "targets": [one.root for one in targets],
        }
        made |= {"device": device_name(ranks.device), "ranks": ranks.size}
        write_json(self.root / RUN, {**made, "config": config.record(), **provenance()})
        self.checkpoints.mkdir(exist_ok=True)  # behind run.json, without which it is a folder of something else

    def _same(self, record: dict[str, Any], now: dict[str, Any], model: type[TrainConfig]) -> None:
        differ = differences(identity_of(record) or {}, now, defaults(model))
        if differ:
            changes = ", ".join(f"{name}={there!r} there, {here!r} now" for name, there, here in differ)
            raise XtokenError(f"{self.root} holds another run: {changes}; use another --out, or the same options")

    def summary(self) -> dict[str, Any] | None:
        """What the finished run returned; None while it is not finished, or its model is gone and can be written.

        Raises:
            XtokenError: it is damaged, or the model is gone for good.
        """
        path, resumes = self.root / SUMMARY, any(self.checkpoints.glob("step-*"))
        if not path.exists():
            return None
        record: Any = parsed(path.read_bytes())
        if not isinstance(record, dict) or "steps" not in record:
            mend = "remove it" if resumes else "put a copy of it there (no checkpoint is left to make it from)"
            raise XtokenError(f"{path} is damaged: it says nothing of steps; {mend} and run the same command again")
        missing = lacking(self.model)
        if missing is not None and not resumes:
            raise XtokenError(
                f"the run is finished, but {self.model / missing} is missing or empty and no checkpoint is left to "
                f"write it from; put it back, or train again with another --out"
            )
        return record if missing is None else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Record that the run is finished."""
        write_json(self.root / SUMMARY, summary)


def begun_with(out: str) -> dict[str, Any] | None:
    """The settings of the run that has begun in a folder; None where there is none."""
    root = Path(out)
    record = parsed((root / RUN).read_bytes()) if (root / RUN).is_file() and _begun(root) else None
    return TrainConfig.settings_of(record) if isinstance(record, dict) else None


def _begun(root: Path) -> bool:
    """Whether a run got as far as measuring or training: a failed start must not bind the folder."""
    metrics = root / METRICS
    measured = metrics.exists() and metrics.stat().st_size > 0
    return measured or any((root / CHECKPOINTS).glob("*step-*")) or (root / SUMMARY).exists()


def _streams(record: dict[str, Any]) -> int:
    value = (identity_of(record) or {}).get("streams")
    return value if isinstance(value, int) else 0


def _identity(
    config: TrainConfig, targets: Sequence[Targets], tokenizer: TokenizerInfo, streams: int
) -> dict[str, Any]:
    return identity(config) | {
        "targets_hash": [one.hash for one in targets],
        "tokenizer_hash": tokenizer.hash,
        "streams": streams,
        "template": _template_hash(config.student.template),
    }


def _template_hash(path: str | None) -> str | None:
    """The sha256 of a file with a chat template: wherever it lies, the trained model carries what it says."""
    try:
        return None if path is None else hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise XtokenError(
            f"--template {path} cannot be read ({error.strerror}); name a file with Jinja text"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
