"""The folder of a run: run.json says what it is, so that a rerun resumes it and another run is refused."""

from collections.abc import Sequence
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from schemas.errors import XtokenError
from schemas.manifest import TokenizerInfo, digest, provenance
from schemas.train_config import TrainConfig
from trainer.data.targets import Targets
from trainer.student.model import write_json

RUN, SUMMARY = "run.json", "summary.json"
# Where files lie, where the model runs and how often it is saved may change between two starts of one run.
_FREE = ("targets", "out", "device", "save_every", "keep")


class Run:
    """``config.out``, opened: new, or the same run as before.

    Raises:
        XtokenError: the folder is a URL, or holds something else.
    """

    def __init__(self, config: TrainConfig, targets: Sequence[Targets], tokenizer: TokenizerInfo) -> None:
        if "://" in config.out:
            raise XtokenError(f"out={config.out!r} is a URL; training writes to a local folder, copy it from there")
        self.root = Path(config.out)
        self.checkpoints = self.root / "checkpoints"
        self.model, self.metrics = self.root / "model", self.root / "metrics.jsonl"
        identity = _identity(config, targets, tokenizer)
        found = self._read(RUN)
        if found is None and self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise XtokenError(f"{self.root} exists and is no training run; use another --out")
        if found is None or not self._begun():
            self._create(identity, config, targets)
        else:
            self._same(found, identity)

    def _begun(self) -> bool:
        """Whether the run got as far as measuring or training: a failed start must not bind the folder."""
        measured = self.metrics.exists() and self.metrics.stat().st_size > 0
        return measured or any(self.checkpoints.glob("*step-*")) or (self.root / SUMMARY).exists()

    def _create(self, identity: dict[str, Any], config: TrainConfig, targets: Sequence[Targets]) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        made = {"identity": identity, "run_hash": digest(identity), "targets": [one.root for one in targets]}
        write_json(self.root / RUN, {**made, "config": config.model_dump(mode="json"), **provenance()})

    def _same(self, found: dict[str, Any], identity: dict[str, Any]) -> None:
        before = found.get("identity", {})
        names = [name for name in identity if before.get(name) != identity[name]]
        if names:
            changes = ", ".join(f"{name}={before.get(name)!r} there, {identity[name]!r} now" for name in names)
            raise XtokenError(f"{self.root} holds another run: {changes}; use another --out, or the same options")

    def summary(self) -> dict[str, Any] | None:
        """What the finished run returned, or None while it is not finished."""
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


def _identity(config: TrainConfig, targets: Sequence[Targets], tokenizer: TokenizerInfo) -> dict[str, Any]:
    options = {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE}
    return options | {"targets_hash": [one.hash for one in targets], "tokenizer_hash": tokenizer.hash}
