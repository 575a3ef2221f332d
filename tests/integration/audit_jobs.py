"""A capture's job for tests of ``--audit hf`` by several worker processes."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from xtoken.pipeline.capture import audit, run_identity
from xtoken.pipeline.capture.worker import CaptureJob, CaptureWorker
from xtoken.pipeline.capture.worker_threads import Prepared
from xtoken.pipeline.store.writer import Sample
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.manifest import Part

_WAIT_SECONDS = 240


@dataclass(frozen=True)
class TogetherJob:
    """Workers that start together; the first that loads the teacher for its audit dies of it.

    The other publishes one shard before another has done so: who follows the dead one must find work left.

    Attributes:
        config: of the capture.
        folder: ``open-SLOT`` is there for each worker that has opened, ``loaded-PID`` for each that loads for an audit.
        workers: how many wait for each other.
    """

    config: PrecomputeConfig
    folder: str
    workers: int = 2

    @property
    def ahead(self) -> int:
        """As many as a capture's."""
        return CaptureJob(self.config).ahead

    def open(self, slot: int = 0) -> CaptureWorker:
        """A capture's worker, once all have opened."""
        run_identity.content_hash = None  # type: ignore[assignment] # the driver has hashed the weights
        worker = CaptureJob(self.config).open(slot)
        score = audit._Transformers.__call__

        def scored(self_: Any, prompts: Sequence[Any]) -> Any:
            loads = len(self._there("loaded-*"))
            (Path(self.folder) / f"loaded-{os.getpid()}").touch()
            if not loads:
                os.kill(os.getpid(), signal.SIGKILL)
            return score(self_, prompts)

        audit._Transformers.__call__ = scored  # type: ignore[method-assign]
        worker.publish = partial(self._publish, worker.publish, Counter[str]())  # type: ignore[method-assign]
        (Path(self.folder) / f"open-{slot}").touch()
        self._wait_for("open-*", self.workers)
        return worker

    def _publish(
        self, publish: Callable[..., Part], done: Counter[str], prepared: Prepared, samples: Sequence[Sample]
    ) -> Part:
        if done["shards"]:
            self._wait_for("loaded-*", 2)
        done["shards"] += 1
        return publish(prepared, samples)

    def _wait_for(self, names: str, count: int) -> None:
        until = time.monotonic() + _WAIT_SECONDS
        while len(self._there(names)) < count and time.monotonic() < until:
            time.sleep(0.02)

    def _there(self, names: str) -> list[Path]:
        return list(Path(self.folder).glob(names))
