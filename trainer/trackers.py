"""What a run's figures are sent to beside metrics.jsonl: TensorBoard and Weights & Biases, both optional.

metrics.jsonl stays the record. A service that fails is reported once and never stops a run.
"""

import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from xtoken.schemas.configs.train import ReportGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.atomic import write_text

TENSORBOARD, WANDB_ID = "tensorboard", "wandb-id"
# Seconds that W&B's service keeps lines in memory. At its default of 15, a kill takes lines of steps before the last
# checkpoint, which no resumed run makes again.
_FLUSH = "x_transaction_log_flush_interval"
_LOG = logging.getLogger("xtoken")


def require_trackers(report: ReportGroup) -> None:
    """Check that what ``report`` asks for can be used, before anything large is loaded.

    Raises:
        XtokenError: TensorBoard or W&B is not installed, or nobody is logged in to W&B.
    """
    if report.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise XtokenError("--tensorboard needs TensorBoard; pip install 'xtoken[tracking]'") from error
    if report.wandb is not None:
        try:
            import wandb
        except ImportError as error:
            raise XtokenError("--wandb needs the client of W&B; pip install 'xtoken[tracking]'") from error
        if _wandb_mode() == "online" and not wandb.login(prompt=False, verify=False):
            raise XtokenError(
                "--wandb: nobody is logged in to W&B here; run 'wandb login', set WANDB_API_KEY, or set "
                "WANDB_MODE=offline and send the run later with 'wandb sync'"
            )


def _wandb_mode() -> str:
    import wandb

    return os.environ.get("WANDB_MODE") or str(wandb.setup().settings.mode)


class _Tracker(Protocol):
    name: str

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of one run; made by one rank only.

    Args:
        root: the run's folder. TensorBoard's events go to ``root/tensorboard``; W&B's id is kept in ``root/wandb-id``,
            so that a resumed run goes on as the same one, its local files in ``root/wandb``.
        tensorboard: write events for TensorBoard.
        wandb: project of W&B, or None.
        run_name: the name W&B shows.
        config: what W&B shows as the run's configuration.
        resumed_step: the last step that stays: TensorBoard drops what an earlier start wrote after it. W&B keeps such
            points, and those of the repeated steps follow at the same place of the ``step`` axis.
    """

    def __init__(
        self,
        root: Path,
        tensorboard: bool,
        wandb: str | None,
        run_name: str,
        config: Mapping[str, Any],
        resumed_step: int,
    ) -> None:
        self._open: list[_Tracker] = []
        if tensorboard:
            self._open.append(_TensorBoard(root / TENSORBOARD, resumed_step))
        if wandb is not None:
            self._open.append(_WandB(root, wandb, run_name, config))
        self._reported: set[str] = set()

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Send the numbers in ``figures``; nested ones are named by their path: ``eval/by_source/books``."""
        numbers = dict(flat(figures))
        for tracker in self._open:
            try:
                tracker.log(step, numbers)
            except Exception as error:  # a service's own errors must not end weeks of training
                self._report(tracker, error)

    def close(self) -> None:
        """Send what is still held."""
        for tracker in self._open:
            try:
                tracker.close()
            except Exception as error:  # as in log
                self._report(tracker, error)
        self._open = []

    def _report(self, tracker: _Tracker, error: Exception) -> None:
        if tracker.name not in self._reported:
            _LOG.warning("%s fails (%r); training goes on, metrics.jsonl holds every figure", tracker.name, error)
        self._reported.add(tracker.name)


def flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings and lists, each with its path; whatever else there is is left out."""
    for key, value in figures.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}/")
        elif isinstance(value, (list, tuple)):
            yield from flat({str(i): item for i, item in enumerate(value)}, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, resumed_step: int) -> None:
        self._folder = str(folder)
        self._begin(resumed_step)

    def _begin(self, last: int) -> None:
        """Go on after step ``last``; what later steps left is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        _wait_for_a_later_name(Path(self._folder))
        writer: Any = SummaryWriter
        self._last, self._writer = last, writer(self._folder, purge_step=last + 1)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if step < self._last:  # the run went back to a checkpoint
            self._writer.close()
            self._begin(step - 1)
        self._last = step
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        # A kill must not take figures of steps that a checkpoint holds: they would not be made again.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """TensorBoard reads files by name, and those of one second by a number as text: the tenth before the ninth."""
    found = (re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.*"))
    latest = max((int(match[1]) for match in found if match), default=0)
    if latest <= (now := time.time()) < latest + 1:
        time.sleep(latest + 1 - now)


class _WandB:
    name = "W&B"

    def __init__(self, root: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        import wandb

        options: dict[str, Any] = {"project": project, "id": _run_id(root), "name": run_name, "dir": str(root)}
        options |= {"config": dict(config), "resume": "allow", "reinit": "create_new"}
        try:
            self._run = wandb.init(**options, settings=_wandb_settings())
        except wandb.Error as error:
            _LOG.warning("W&B cannot be reached (%s); 'wandb sync' in %s/wandb sends this run later", error, root)
            wandb.teardown()  # its service still holds the id of the run that did not start
            patient = _wandb_settings(init_timeout=90)  # nobody is called: a busy machine is all that this can wait for
            self._run = wandb.init(**options, settings=patient, mode="offline")
        # A resumed run repeats steps, and W&B refuses a step of its own that goes back: ours is an axis like any other.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        import wandb

        self._run.finish()
        # finish() only asks W&B's service to close the run's file; a process that ends without Python's exit handlers
        # (a child of multiprocessing, a container that stops) could take the last lines along.
        if wandb.run is None:  # else whoever calls us has a run of their own
            wandb.teardown()


def _wandb_settings(**more: Any) -> Any:
    import wandb

    # The run's folder records code and argv; a diff of whatever repository lies around is nobody's business.
    options: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
    if _FLUSH in wandb.Settings.model_fields:
        options[_FLUSH] = 1.0
    return wandb.Settings(**options, **more)


def _run_id(root: Path) -> str:
    """The id of this folder's run, made once."""
    path = root / WANDB_ID
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_text(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
