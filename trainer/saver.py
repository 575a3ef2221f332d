"""Checkpoints written in a thread while the next steps run.

A step waits for a copy of the tensors in memory of the host and for no disk. One checkpoint is written at a time; what
goes wrong with it is raised by whatever the run asks next. Where memory has no room for the copy, the run waits as it
would without a thread.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.memory import free_memory
from xtoken.trainer.checkpoint import Policy, save_checkpoint

_LOG = logging.getLogger("xtoken")
# Of free memory that copies may take: what the run allocates meanwhile must not meet the end of it.
_SHARE = 0.5


def room_to_copy(tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether copies of all tensors fit well into memory of the host."""
    free = free_memory()
    size = sum(one.numel() * one.element_size() for members in tensors.values() for one in members.values())
    return free is None or size <= _SHARE * free


class Saver:
    """Writes checkpoints of one run, one after the other."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._begun: Future[None] | None = None

    def begin(
        self, root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], policy: Policy
    ) -> None:
        """Write a checkpoint (see ``save_checkpoint``) of tensors that nothing else changes; the last one is whole.

        Raises:
            XtokenError: the disk refused the last one.
        """
        self.join()
        self._begun = self._pool.submit(save_checkpoint, root, step, tensors, state, policy)

    def look(self) -> None:
        """Raise what went wrong with a checkpoint that is no longer being written."""
        if self._begun is not None and self._begun.done():
            self.join()

    def join(self) -> None:
        """Wait until the checkpoint that was begun is whole.

        Raises:
            XtokenError: the disk refused it.
        """
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def close(self) -> None:
        """Finish what was begun, when the run has ended or failed; an error is said, as another may be on its way."""
        try:
            self.join()
        except (XtokenError, OSError) as error:
            _LOG.warning("%s", error)
        self._pool.shutdown()
