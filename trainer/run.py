"""The folder of a run: run.json says what it is, so that a rerun resumes it and another run is refused."""

import json
from collections.abc import Sequence
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from schemas.errors import XtokenError
from schemas.manifest import TokenizerInfo, digest, provenance
from schemas.train_config import TrainConfig
from trainer.data.targets import Targets
from trainer.lock import LOCK
from trainer.ranks import Ranks, device_name

RUN, SUMMARY = "run.json", "summary.json"
# Where files lie, where and how the model runs, what is saved and shown: all may change between two starts of a run.
_FREE = (
    *("targets", "out", "device", "decoders", "parallel", "activation_checkpointing", "compile", "kernel"),
    "micro_tokens",  # which changes no loss: it is the way out where memory is short
    *("save_every", "keep", "keep_every", "spike", "rollback", "eval_every", "completions", "tensorboard", "wandb"),
)


def refuse_foreign(out: str) -> None:
    """Raise XtokenError where ``out`` is no local folder, or one that holds something else than a run."""
    if "://" in out:
        raise XtokenError(f"out={out!r} is a URL; training writes to a local folder, copy it from there")
    root = Path(out)
    if not root.exists() or (root / RUN).exists():
        return
    if not root.is_dir() or any(path.name != LOCK for path in root.iterdir()):
        raise XtokenError(f"{root} exists and is no training run; use another --out")


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
        self.checkpoints = self.root / "checkpoints"
        self.model, self.metrics = self.root / "model", self.root / "metrics.jsonl"
        self.rehearsal = self.root / ".model.rehearsal"
        found = self._read(RUN)
        begun = found is not None and self._begun()
        self.streams = config.streams or (_streams(found) if found is not None and begun else 0) or ranks.size
        if self.streams % ranks.size:
            raise XtokenError(
                f"{self.streams} streams cannot be dealt to {ranks.size} ranks evenly; start a divisor of "
                f"{self.streams} processes, or another run with --streams a multiple of the ranks"
            )
        identity = _identity(config, targets, tokenizer, self.streams)
        if found is not None and begun:
            self._same(found, identity)
        elif ranks.first:
            self._create(identity, config, targets, ranks)

    def _begun(self) -> bool:
        """Whether the run got as far as measuring or training: a failed start must not bind the folder."""
        measured = self.metrics.exists() and self.metrics.stat().st_size > 0
        return measured or any(self.checkpoints.glob("*step-*")) or (self.root / SUMMARY).exists()

    def _create(self, identity: dict[str, Any], config: TrainConfig, targets: Sequence[Targets], ranks: Ranks) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        made: dict[str, Any] = {
            "identity": identity,
            "run_hash": digest(identity),
            "targets": [one.root for one in targets],
        }
        made |= {"device": device_name(ranks.device), "ranks": ranks.size}
        write_json(self.root / RUN, {**made, "config": config.model_dump(mode="json"), **provenance()})

    def _same(self, found: dict[str, Any], identity: dict[str, Any]) -> None:
        before = found.get("identity", {})
        names = [name for name in identity if before.get(name) != identity[name]]
        if names:
            changes = ", ".join(f"{name}={before.get(name)!r} there, {identity[name]!r} now" for name in names)
            raise XtokenError(f"{self.root} holds another run: {changes}; use another --out, or the same options")

    def summary(self) -> dict[str, Any] | None:
        """What the finished run returned; None while it is not finished, or its model is gone and can be written."""
        if not self.model.exists() and any(self.checkpoints.glob("step-*")):
            return None
        return self._read(SUMMARY)

    def finish(self, summary: dict[str, Any]) -> None:
        """Record that the run is finished."""
        write_json(self.root / SUMMARY, summary)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = loads((self.root / name).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (JSONDecodeError, UnicodeDecodeError) as error:
            raise XtokenError(f"{self.root / name} is damaged ({error}); use another --out") from error
        return value


def _streams(found: dict[str, Any]) -> int:
    value = found.get("identity", {}).get("streams")
    return value if isinstance(value, int) else 0


def _identity(
    config: TrainConfig, targets: Sequence[Targets], tokenizer: TokenizerInfo, streams: int
) -> dict[str, Any]:
    options = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE}
    return options | {
        "targets_hash": [one.hash for one in targets],
        "tokenizer_hash": tokenizer.hash,
        "streams": streams,
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
