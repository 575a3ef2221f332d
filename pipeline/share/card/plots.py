"""The card's plots as PNG. The same numbers give the same bytes, and no word of a manifest is drawn."""

from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.row_stats import ENTROPY_BIN, RowStats, quantile, tail_mass

BYTES, MASS, ENTRIES, ENTROPY = (
    f"plots/{name}.png" for name in ("bytes-per-token", "mass-kept", "entries-per-row", "entropy")
)
PLOTS = (BYTES, MASS, ENTRIES, ENTROPY)
_INK, _GRID, _WIDTH, _HEIGHT = "#1f5a8a", "#d9d9d9", 5.2, 3.0
_MOST_BARS = 64
_TAILS = 10.0 ** np.arange(-4, 0.01, 0.05)  # where the curve of the tail mass is drawn


def draw_plots(columns: Mapping[str, float], stats: RowStats, entries: str) -> dict[str, bytes]:
    """Name -> PNG of each plot that the capture has numbers for; nothing at all without matplotlib.

    Args:
        columns: bytes per token by column.
        stats: of its rows.
        entries: what a row's entries are called.
    """
    try:
        import matplotlib
    except ImportError:
        return {}
    drawings: dict[str, Callable[[Any], None]] = {BYTES: partial(_bars_by_column, columns=columns)}
    if stats.tail.any():
        drawings[MASS] = partial(_mass_curve, stats=stats)
    if stats.entries.any():
        drawings[ENTRIES] = partial(_entry_bars, counts=stats.entries, what=entries)
        drawings[ENTROPY] = partial(_entropy_bars, counts=stats.entropy)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own style would change the bytes
        return {name: _png(draw) for name, draw in drawings.items()}


def _png(draw: Callable[[Any], None]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.set_axisbelow(True)
    draw(axis)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _label(axis: Any, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)


def _bars_by_column(axis: Any, columns: Mapping[str, float]) -> None:
    shown = sorted(columns.items(), key=lambda item: (item[1], item[0]))
    bars = axis.barh([name for name, _ in shown], [size for _, size in shown], color=_INK)
    axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axis.margins(x=0.12)
    axis.grid(axis="x", color=_GRID)
    _label(axis, "Where the bytes are", "compressed bytes per token", "")


def _mass_curve(axis: Any, stats: RowStats) -> None:
    mass, share = tail_mass(stats.step)[::-1], np.cumsum(stats.tail[::-1]) / stats.tail.sum()
    within = np.searchsorted(mass, _TAILS, side="right")  # levels whose mass is at most this
    axis.plot(_TAILS, np.concatenate([[0.0], share])[within], color=_INK, linewidth=1.8)
    axis.set_xscale("log")
    axis.set_xlim(_TAILS[0], 1.0)
    axis.set_ylim(0.0, 1.02)
    axis.grid(color=_GRID)
    _label(axis, "Tail mass", "probability in none of a row's kept entries", "share of rows up to it")


def _entry_bars(axis: Any, counts: NDArray[np.int64], what: str) -> None:
    top = int(np.flatnonzero(counts)[-1])
    width = -(-(top + 1) // _MOST_BARS)
    share = np.add.reduceat(counts[: top + 1], np.arange(0, top + 1, width)) / counts.sum()
    axis.bar(
        np.arange(len(share)) * width, share, width=0.9 * width, align="edge" if width > 1 else "center", color=_INK
    )
    axis.grid(axis="y", color=_GRID)
    _label(axis, f"{what[0].upper()}{what[1:]}", what, "share of rows")


def _entropy_bars(axis: Any, counts: NDArray[np.int64]) -> None:
    shown = counts[: max(quantile(counts, 0.9999), int(4 / ENTROPY_BIN)) + 1]
    lefts = np.arange(len(shown)) * ENTROPY_BIN
    axis.bar(lefts, shown / counts.sum(), width=0.9 * ENTROPY_BIN, align="edge", color=_INK)
    axis.grid(axis="y", color=_GRID)
    _label(axis, "Entropy of the teacher's rows", "nats", "share of rows")
