"""CPU time of the stage by step: for a while functions are replaced by ones that stop the clock of who calls them."""

import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

from xtoken.schemas.losses import LOSSES

# (module, name in it, step). A name of a class is a method; of a table of functions, each of them.
Steps = Sequence[tuple[str, str, str]]
STAGE, PARTS = "xtoken.pipeline.align.stage", "xtoken.pipeline.align.parts"
STEPS: Steps = (
    (STAGE, "publish_part", "publish: sha256, sync, commit"),
    (STAGE, "write_parquet", "write"),
    (STAGE, "_Written.check", "check of what is written"),
    (PARTS, "CaptureParts.read", "read"),
    (PARTS, "CaptureParts._refuse_other_bytes", "sha256 of what is read"),
    (PARTS, "CaptureCheck.batch", "checks of rows read"),
    (PARTS, "restore_ids", "restore, decode, normalise"),
    (STAGE, "_refuse_foreign_ids", "checks of rows read"),
    (STAGE, "encode", "byte ends"),
    (STAGE, "join", "cut"),
    (STAGE, "summary_batch", "checks of targets: figures of each batch"),
    ("xtoken.pipeline.align.checks", "Rules.check", "checks of targets: SQL over a part"),
    (STAGE, "target_batch", "other columns"),
    (STAGE, "TargetForm.stored_batch", "steps and codes"),
    ("xtoken.pipeline.align.rows", "RowBatch.of", "restore, decode, normalise"),
    ("xtoken.pipeline.align.rows", "RowBatch.spans", "rows of chunks"),
    ("xtoken.pipeline.align.losses.base", "merge_rows", "rows of chunks"),
    *(
        (f"xtoken.pipeline.align.losses.{loss.module}", "Builder.columns", f"targets: {name}")
        for name, loss in LOSSES.items()
        if loss.columns
    ),
)
TOKENIZE = "tokenize (the library)"


class Clock:
    """CPU seconds by step; a step's clock stands still while another runs inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = time.process_time()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count the block as this step."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, counted as this step; of a generator, each of its turns."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.step(name):
                found = function(*args, **kwargs)
            return self._turns(found, name) if isinstance(found, GeneratorType) else found

        return call

    def _turns(self, found: Iterator[Any], name: str) -> Iterator[Any]:
        end = object()
        while True:
            with self.step(name):
                item = next(found, end)
            if item is end:
                return
            yield item

    @contextmanager
    def over(self, steps: Steps) -> Iterator[list[str]]:
        """Count these functions inside the block; gives the names that are not there, whose time goes to who calls."""
        undo: list[Callable[[], None]] = []
        missing: list[str] = []
        try:
            for module, name, step in steps:
                try:
                    undo.append(self._replace(module, name, step))
                except (AttributeError, KeyError, ModuleNotFoundError):
                    missing.append(f"{module}.{name}")
            yield missing
        finally:
            for one in reversed(undo):
                one()

    def _replace(self, module: str, name: str, step: str) -> Callable[[], None]:
        """Replace one function; returns what puts it back."""
        *outer, last = name.split(".")
        owner = functools.reduce(getattr, outer, importlib.import_module(module))
        found = vars(owner)[last] if isinstance(owner, type) else getattr(owner, last)
        if isinstance(found, dict):
            before = dict(found)
            found.update({key: self.timed(one, f"{step}: {key}") for key, one in before.items()})
            return functools.partial(found.update, before)
        inner = found.__func__ if isinstance(found, classmethod) else found
        timed: Any = self.timed(inner, step)
        setattr(owner, last, classmethod(timed) if isinstance(found, classmethod) else timed)
        return functools.partial(setattr, owner, last, found)
