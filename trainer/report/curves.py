"""Panels as inline SVG: drawn by matplotlib, coloured by the page's style sheet, so that they turn dark with it."""

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

import numpy as np

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.report.markup import Html, element, join, shown
from xtoken.trainer.report.series import Curve, Panel

COLOURS = 8  # of the style sheet; what comes after them is dashed
DASHES = ("-", "--", ":", "-.")
_SIZE = (3.7, 2.5)  # inches; the page scales them
_BOX = (0.155, 0.17, 0.83, 0.71)  # the same for all, so that panels line up
_WIDE = 15.0  # from this ratio of largest to smallest on, a scale is logarithmic
# Colours that stand for the page's own until the drawing is done.
_INK, _SOFT, _LINE = "#010203", "#010204", "#010205"
_STANDS_FOR = {_INK: "currentColor", _SOFT: "var(--soft)", _LINE: "var(--line)"}
_COLOURS = {f"#0a0b{at:02x}": f"var(--c{at})" for at in range(COLOURS)}
_TIMES = ((2 * 3600.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def draw(panels: Sequence[Panel], prefix: str) -> list[Html]:
    """One svg element each; the same panels give the same bytes.

    Args:
        panels: what to draw.
        prefix: letters that begin every id, as a page has many drawings.

    Raises:
        XtokenError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise XtokenError("the report's curves need matplotlib; install it: pip install 'xtoken[plots]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own style would change the bytes
        matplotlib.rcParams.update({"svg.hashsalt": "xtoken", "svg.fonttype": "none", "font.size": 8})
        return [_svg(panel, f"{prefix}{at}") for at, panel in enumerate(panels)]


def legend(labels: Sequence[str], *, goal: bool, events: bool) -> Html:
    """What the lines are, as markup: it serves all panels."""
    items = [Html(f"<li>{_swatch(f'var(--c{at % COLOURS})', _dash(at))}{shown(x)}</li>") for at, x in enumerate(labels)]
    if goal:
        items.append(Html(f"<li>{_swatch('currentColor', '1 3')}the teacher's own</li>"))
    if events:
        items.append(Html(f"<li>{_swatch('var(--soft)', '4 2', upright=True)}an event (listed below)</li>"))
    return element("ul", join(items), class_="legend")


def _dash(at: int) -> str:
    return {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[DASHES[at // COLOURS % len(DASHES)]]


def _swatch(colour: str, dash: str, *, upright: bool = False) -> str:
    path = "M12 0V12" if upright else "M0 6H24"
    style = f"stroke:{colour};stroke-width:2;stroke-dasharray:{dash or 'none'}"
    return (
        f'<svg viewBox="0 0 24 12" width="24" height="12" aria-hidden="true"><path d="{path}" style="{style}"/></svg>'
    )


def _svg(panel: Panel, prefix: str) -> Html:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, facecolor="none")
    FigureCanvasSVG(figure)
    axis = figure.add_axes(_BOX)
    scale, unit = _axis_unit(panel)
    for curve in panel.curves:
        _draw_curve(axis, curve, scale, panel.points)
    for goal in panel.goals:
        axis.axhline(goal, color=_INK, linewidth=1, linestyle=(0, (1, 3)))
    for group, x in panel.events:
        axis.axvline(x / scale, color=f"#0a0b{group % COLOURS:02x}", linewidth=0.7, linestyle=(0, (4, 2)), zorder=1)
    _style(axis, panel, unit)
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _for_the_page(buffer.getvalue(), prefix, f"{panel.title} ({panel.unit}) over {unit}")


def _axis_unit(panel: Panel) -> tuple[float, str]:
    """What x is divided by, and what it then counts."""
    if panel.over == "tokens":
        return 1.0, "student tokens"
    most = max((float(curve.x_P.max()) for curve in panel.curves), default=0.0)
    return next((scale, name) for least, scale, name in _TIMES if most >= least)


def _draw_curve(axis: Any, curve: Curve, scale: float, points: bool) -> None:
    colour, dash = f"#0a0b{curve.group % COLOURS:02x}", DASHES[curve.group // COLOURS % len(DASHES)]
    x_P = curve.x_P / scale
    y_P = np.where(np.isfinite(curve.y_P), curve.y_P, np.nan)
    marker = "o" if points or np.isfinite(y_P).sum() < 2 else None
    axis.plot(x_P, y_P, color=colour, linestyle=dash, linewidth=1.3, marker=marker, markersize=2.5)
    if curve.low_P is not None and curve.high_P is not None:
        axis.fill_between(x_P, curve.low_P, curve.high_P, color=colour, alpha=0.2, linewidth=0)


def _style(axis: Any, panel: Panel, unit: str) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

    values = np.concatenate([*(curve.y_P for curve in panel.curves), panel.goals])
    values = values[np.isfinite(values)]
    title = f"{panel.title} ({panel.unit}"
    if len(values) and not panel.linear and values.min() > 0 and values.max() / values.min() > _WIDE:
        axis.set_yscale("log")
        axis.set_ylim(values.min() / 1.15, values.max() * 1.15)  # a band that reaches 0 would stretch it
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(_plain))
        axis.minorticks_off()
        title += ", log scale"
    else:
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    if panel.over == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_title(f"{title})", fontsize=8, loc="left", color=_INK)
    axis.set_xlabel(unit, fontsize=8, color=_SOFT)
    axis.tick_params(colors=_SOFT, labelsize=8, length=2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_LINE)
    axis.grid(color=_LINE, linewidth=0.6)
    axis.set_axisbelow(True)


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _for_the_page(svg: str, prefix: str, label: str) -> Html:
    """Without what belongs to a file of its own: prolog, metadata, a style for the whole page, ids twice."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}-{match[1]}"' if match[1] in used else "", svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None, "matplotlib writes a viewBox"
    svg = re.sub(r"<svg[^>]*>", f'<svg {box[0]} role="img" aria-label={_quoted(label)}>', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), svg)
    for stand_in, colour in (_STANDS_FOR | _COLOURS).items():
        svg = svg.replace(stand_in, colour)
    return Html(re.sub(r"\s*\n\s*", "\n", svg).strip())


def _quoted(text: str) -> str:
    return '"' + re.sub(r"[^ -~]|[\"<>&\\]", " ", text) + '"'
