"""The lab's pictures: an interval for each claim, and numerals over training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

COLOURS = {"reproduced": "#2a7f3f", "not reproduced": "#b3372f", "too small to tell": "#777777"}
HEIGHT = 0.32  # inches of a row


def draw_claims(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Each compared pair: its difference with the interval, and the margin; below zero is better. One panel a figure.

    Args:
        rows: of ``tables.claims``.
        out: SVG.
    """
    ran = [row for row in rows if row["verdict"] != "not run"]
    figures = list(dict.fromkeys(row["figure"] for row in ran))
    groups = {name: [row for row in ran if row["figure"] == name] for name in figures}
    _settle()
    sizes = [len(group) for group in groups.values()]
    picture = Figure(figsize=(9.5, HEIGHT * sum(sizes) + 0.75 * len(sizes)), layout="constrained")
    axes = picture.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": sizes})[:, 0]
    for axis, (figure, group) in zip(axes, groups.items(), strict=True):
        for place, row in enumerate(group):
            colour = COLOURS[row["verdict"]]
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
            axis.plot(row["difference"], place, "o", color=colour, markersize=4)
            axis.plot([-row["margin"]] * 2, [place - 0.35, place + 0.35], color="black", linewidth=0.8)
        axis.axvline(0, color="black", linewidth=0.5, linestyle=":")
        axis.set_yticks(range(len(group)), [f"{row['ours']} against {row['theirs']}" for row in group])
        axis.invert_yaxis()
        axis.set_title(UNITS[figure], loc="left", fontsize=8)
    handles = [mpl.lines.Line2D([], [], color=colour, label=verdict) for verdict, colour in COLOURS.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    picture.savefig(out, metadata={"Date": None})


UNITS = {
    "held-out": "held-out documents: difference in bits per byte (left: better; bar: the margin)",
    "other": "text of other kinds: difference in bits per byte",
    "numerals": "numerals of two or three digits: difference in bits each",
    "early": "the same after 80 steps",
    "next-byte": "KL of the next byte to the model before its move: difference in nats",
}


def draw_numerals(curves: Mapping[str, Mapping[int, float]], out: Path) -> None:
    """Bits per numeral over training.

    Args:
        curves: of each setting, by step.
        out: SVG.
    """
    _settle()
    picture = Figure(figsize=(6.5, 3.4), layout="constrained")
    axis = picture.subplots()
    for name, points in curves.items():
        axis.plot(list(points), list(points.values()), label=name)
    axis.set_xlabel("steps of 1,024 tokens")
    axis.set_ylabel("bits per numeral of two or three digits")
    axis.legend(frameon=False)
    picture.savefig(out, metadata={"Date": None})


def _settle() -> None:
    mpl.rcdefaults()
    mpl.rcParams.update(
        {"svg.hashsalt": "xtoken", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    )
