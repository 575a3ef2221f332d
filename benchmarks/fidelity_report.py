"""The figure and the tables of ``benchmarks.fidelity``."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.fidelity_rows import DEFAULT
from benchmarks.machine import machine_line

FAMILIES = {
    "topk": ("top-k with REST", "#1f77b4", "o"),
    "floored": ("top-k, floor min_p", "#17becf", "s"),
    "drop": ("top-k renormalised", "#7f7f7f", "X"),
    "independent": ("draws, independent", "#ff7f0e", "v"),
    "systematic": ("draws, systematic", "#d62728", "^"),
    "head+tail": ("head + draws behind it", "#9467bd", "D"),
}
_OFFSETS = {
    "topk": (5, 5),
    "floored": (5, -13),
    "drop": (6, 4),
    "independent": (6, 4),
    "systematic": (8, 0),
    "head+tail": (8, -3),
}
TITLES = {
    "p-kl": "P-KL (Gemma-3-270m to SmolLM2-135M)",
    "byte-prefix": "byte-prefix, root term",
    "sparse-kl": "forward KL, one tokenizer",
}


def family_of(row: dict[str, Any]) -> str:
    """Family as drawn: a floor is a line of its own."""
    return "floored" if row["family"] == "topk" and row["min_p"] else row["family"]


def averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per setting, loss and batch: mean over seeds, least and greatest angle."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["loss"], row["family"], row["label"], row["chunks"]].append(row)
    found = []
    for same in groups.values():
        mean = {name: value for name, value in same[0].items() if name != "seed"}
        for name, value in same[0].items():
            if isinstance(value, float) and name not in ("min_p",):
                mean[name] = sum(row[name] for row in same if name in row) / sum(name in row for row in same)
        angles = [row["angle"] for row in same]
        found.append({**mean, "seeds": len(same), "angle_low": min(angles), "angle_high": max(angles)})
    return found


def largest(rows: list[dict[str, Any]], loss: str) -> list[dict[str, Any]]:
    """The rows of a loss's largest batch."""
    most = max(row["chunks"] for row in rows if row["loss"] == loss)
    return [row for row in rows if row["loss"] == loss and row["chunks"] == most]


def draw_figure(rows: list[dict[str, Any]], out: Path) -> None:
    """P-KL large, the two others beneath it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.45, 1))
    panels = {
        "p-kl": figure.add_subplot(grid[0, :]),
        "byte-prefix": figure.add_subplot(grid[1, 0]),
        "sparse-kl": figure.add_subplot(grid[1, 1]),
    }
    for loss, axis in panels.items():
        if any(row["loss"] == loss for row in rows):
            _panel(axis, largest(rows, loss), loss)
    handles, names = panels["p-kl"].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=10, frameon=False)
    figure.savefig(out, dpi=110)


def _panel(axis: Any, rows: list[dict[str, Any]], loss: str) -> None:
    large = loss == "p-kl"
    for family, (name, colour, marker) in FAMILIES.items():
        mine = sorted((row for row in rows if family_of(row) == family), key=lambda row: row["bytes"])
        lines = [[row for row in mine if row["per_mass"]]] if family == "head+tail" else [mine]
        lines += [[row] for row in mine if row not in lines[0]]
        for number, line in enumerate(lines):
            x, y = [row["bytes"] for row in line], [row["angle"] for row in line]
            spread = [
                [row["angle"] - row["angle_low"] for row in line],
                [row["angle_high"] - row["angle"] for row in line],
            ]
            axis.errorbar(
                x, y, yerr=spread, marker=marker, color=colour, linewidth=1.4, markersize=5.5, capsize=2,
                label=None if number else name,
            )  # fmt: skip
        for row in mine:
            crowded = family == "head+tail" and not row["per_mass"]  # the table names these
            if not crowded and (large or family in ("topk", "independent", "systematic")):
                _label(axis, row, family, colour, 8.5 if large else 7.5)
    _mark_default(axis, rows, large)
    axis.set_xscale("log")
    axis.set_yscale("log")
    ticks = [10, 20, 50, 100, 200]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    angles = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if min(r["angle"] for r in rows) / 2 < tick]
    axis.set_yticks(angles, [f"{tick:g}°" for tick in angles])
    axis.set_yticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.set_title(f"{TITLES[loss]}, {rows[0]['chunks']:,} chunks", fontsize=11 if large else 10)
    axis.set_xlabel("bytes per token for the teacher's row", fontsize=9)
    axis.set_ylabel("angle to the gradient from whole rows", fontsize=9)


def _label(axis: Any, row: dict[str, Any], family: str, colour: str, size: float) -> None:
    place, side = ((-7, -11), "right") if family == "head+tail" else (_OFFSETS[family], "left")
    axis.annotate(
        row["label"], (row["bytes"], row["angle"]), textcoords="offset points", xytext=place, ha=side, fontsize=size,
        color=colour,
    )  # fmt: skip


def _mark_default(axis: Any, rows: list[dict[str, Any]], large: bool) -> None:
    for row in rows:
        if row["family"] == DEFAULT.family and row["label"] == DEFAULT.label:
            axis.plot(row["bytes"], row["angle"], "o", markersize=14, markerfacecolor="none", color="black")
            if large:
                axis.annotate(
                    "default", (row["bytes"], row["angle"]), textcoords="offset points", xytext=(-14, -20),
                    ha="right", fontsize=10, fontweight="bold",
                )  # fmt: skip


def table(rows: list[dict[str, Any]], loss: str) -> str:
    """One loss's settings at its largest batch, in Markdown, by family and bytes."""
    head = ["stored", "entries", "bytes", "angle", "spread", "norm", "angle, hidden", "norm, hidden", "loss"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    order = list(FAMILIES)
    for row in sorted(largest(rows, loss), key=lambda row: (order.index(family_of(row)), row["bytes"])):
        spread = f"{row['angle_low']:.2f}-{row['angle_high']:.2f}" if row["seeds"] > 1 else ""
        cells = [
            f"{FAMILIES[family_of(row)][0]}: {row['label']}",
            f"{row['entries']:.1f}",
            f"{row['bytes']:.1f}",
            f"{row['angle']:.2f}",
            spread,
            f"{row['norm']:.3f}",
            f"{row['hidden_angle']:.2f}",
            f"{row['hidden_norm']:.3f}",
            f"{100 * row['value_error']:+.1f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def batch_table(rows: list[dict[str, Any]], loss: str) -> str:
    """Angles of some settings as the batch grows."""
    mine = [row for row in rows if row["loss"] == loss]
    sizes = sorted({row["chunks"] for row in mine})
    lines = ["| stored | " + " | ".join(f"{size:,} chunks" for size in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    shown = [row for row in largest(rows, loss) if row["family"] != "drop" and row["label"] in _GROWING]
    for row in shown:
        same = {r["chunks"]: r["angle"] for r in mine if (r["family"], r["label"]) == (row["family"], row["label"])}
        cells = [f"{same[size]:.2f}" for size in sizes]
        lines.append(f"| {FAMILIES[family_of(row)][0]}: {row['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], windows: int) -> str:
    """The whole page."""
    seeds = max(row["seeds"] for row in rows)
    counted = " and ".join(f"{count:,}" for count in sorted({row["counted"] for row in rows}, reverse=True))
    parts = [
        "# Fidelity against bytes",
        "How close the gradient of the student is to the one from the teacher's whole rows: the angle between the two "
        "in degrees and the ratio of their norms, by the student's output matrix and by its last hidden states. Bytes "
        f"are those of the columns that say the row, written by the product's writer from {counted} rows. Draws: mean "
        f"of {seeds} seeds, with the least and the greatest angle. Rows go through the product's codec, target kernels "
        "and losses; draws are made for the purpose, on whole rows.",
        "![angle against bytes](fidelity.png)",
        _SAYS,
    ]
    for loss, title in TITLES.items():
        if any(row["loss"] == loss for row in rows):
            parts += [f"## {title}, {largest(rows, loss)[0]['chunks']:,} chunks", table(rows, loss)]
            parts += ["Angle as the batch grows:", batch_table(rows, loss)]
    parts += ["## All parameters", _whole(rows), "## How it was made", _made(windows), machine_line()]
    return "\n\n".join(parts) + "\n"


def _whole(rows: list[dict[str, Any]]) -> str:
    """Angles of the gradient by all 135 million parameters."""
    lines = ["| stored (P-KL) | chunks | output matrix | all parameters |", "|---|---:|---:|---:|"]
    for row in rows:
        if "all_angle" in row:
            name = f"{FAMILIES[family_of(row)][0]}: {row['label']}"
            lines.append(f"| {name} | {row['chunks']} | {row['angle']:.2f} | {row['all_angle']:.2f} |")
    return "\n".join([*lines, "", "Draws: the output matrix over all seeds, all parameters for seed 0."])


def _made(windows: int) -> str:
    return (
        f"`python -m benchmarks.fidelity corpus.jsonl --rows gemma.npz --same-rows smollm2.npz --windows {windows}`: "
        "windows of 256 teacher tokens from documents evenly over the corpus of `benchmarks.corpus`; a chunk counts at "
        "the position that predicts its first token. Seeds 0, 1, 2; each row has a generator of its own. For bytes of "
        "systematic draws the tail behind the first 128 entries is that of 200 draws (`benchmarks/fidelity_bytes.py`). "
        "`p≥1/N + N·REST`: entries of at least 1/N (at most 128) kept by the codec, behind them ceil(N * REST) "
        "systematic draws of the others that share REST. Renormalised top-k: P-KL and forward KL with `rest=drop`; the "
        "root term against the renormalised row."
    )


_SAYS = """What it says:

* What top-k leaves out is a bias: its angle stays when the batch grows, that of draws falls with its root. By all
  parameters together, draws are closer still and top-k is further off; by the hidden states, where nothing adds up
  over positions, draws are noisier.
* Systematic draws beat independent ones at every N, by more the larger N is, for some 7 % more bytes.
* A head that is kept exactly with systematic draws behind it beats systematic draws alone by a few percent at the same
  bytes: not enough for a codec of its own.
* Of top-k settings a floor `min_p` buys more per byte than a small k. The worst is to renormalise the kept entries: it
  turns the gradient by several times what the same entries do with REST.
* Where student and teacher share a tokenizer (forward KL) top-k turns the gradient most: the student moves towards the
  kept entries as if REST had no shape. Draws know no such case. Against that, only losses that are linear in the
  teacher's probabilities may use draws.
* The loss's value from top-k is a lower bound. From draws it is right here, where the entropy of the whole target is
  known; a trainer, which sees the draws alone, shows a value that is higher by a number no student can change."""
_GROWING = ("k 32", DEFAULT.label, "k 128", "N 12", "N 50", "N 200", "p≥1/50 + 50·REST")
