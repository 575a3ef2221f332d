"""A PNG of loss, KD and CE over student tokens, for one run or several."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas.errors import XtokenError
from trainer.metrics import read_metrics

PANELS = {"loss": "objective (nats)", "kd": "KD (nats per chunk)", "ce": "cross-entropy (nats per token)"}


def plot_losses(runs: Mapping[str, str], out: str) -> None:
    """Draw the runs (label -> run folder) into ``out``.

    Raises:
        XtokenError: a run has no metrics, or matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise XtokenError("plots need matplotlib; install it: pip install 'xtoken[plots]'") from error
    lines = {label: _steps(folder) for label, folder in runs.items()}
    panels = [name for name in PANELS if any(name in step for steps in lines.values() for step in steps)]
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, name in zip(axes, panels, strict=True):
        _draw(axis, name, lines)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _steps(folder: str) -> list[dict[str, Any]]:
    steps = [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "loss" in line]
    if not steps:
        raise XtokenError(f"{folder} has no metrics.jsonl with steps; 'xtoken train' writes one")
    return steps


def _draw(axis: Any, name: str, lines: Mapping[str, list[dict[str, Any]]]) -> None:
    for label, steps in lines.items():
        points = [(step["tokens"], step[name]) for step in steps if name in step]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    axis.set_xlabel("student tokens")
    axis.set_title(PANELS[name], fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
