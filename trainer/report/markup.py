"""Markup of the report. What runs hold is untrusted text: it is escaped, and what no eye sees is made visible."""

import html
import math
from collections.abc import Iterable, Sequence

from xtoken.schemas.ui.markup import is_unseen, isolated
from xtoken.trainer.report.groups import Spread

_MOST = 2000  # characters of a text that are shown
DASH = "–"


class Html(str):
    """Text that is markup already; any other string is escaped where it is put into a page."""

    __slots__ = ()


def shown(value: str) -> Html:
    """Any text as markup: escaped, isolated from what stands beside it, each unseen character as its code point."""
    if isinstance(value, Html):
        return value
    text = value if len(value) <= _MOST else value[:_MOST]
    parts = "".join(map(_character, text))
    more = f'<i class="sign">{len(value) - _MOST:,} more characters</i>' if len(value) > _MOST else ""
    return Html(parts if value.isascii() and not more else isolated(parts) + more)


def _character(char: str) -> str:
    code = ord(char)
    if char == "\n":
        return "\n"
    if char == " " or not is_unseen(char):
        return html.escape(char)
    return f'<i class="sign">{"TAB" if char == chr(9) else f"U+{code:04X}"}</i>'


def element(name: str, content: str, **attributes: str) -> Html:
    """An element; ``class_`` stands for class, and what is no ``Html`` is escaped."""
    words = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{words}>{shown(content)}</{name}>")


def join(parts: Iterable[str], between: str = "") -> Html:
    """Parts in a row, each escaped unless it is markup."""
    return Html(between.join(map(shown, parts)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, over: Sequence[tuple[str, int]] = ()) -> Html:
    """A table whose first column names its rows; ``over`` are headings of several columns each."""
    top = "".join(f'<th colspan="{width}">{shown(text)}</th>' for text, width in over)
    heads = "".join(f'<th scope="col">{shown(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{shown(row[0])}</th>' + "".join(f"<td>{shown(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    first = f'<tr class="over">{top}</tr>' if over else ""
    whole = f"<table><thead>{first}<tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return Html(f'<div class="wide" tabindex="0">{whole}</div>')


def section(title: str, *content: str, id_: str) -> Html:
    """A section with its heading; content that is empty is left out."""
    return Html(f'<section id="{id_}"><h2>{shown(title)}</h2>{join(part for part in content if part)}</section>\n')


def note(text: str) -> Html:
    """A paragraph of explanation."""
    return element("p", text, class_="note")


def figure_text(value: float | None, digits: int = 4, *, percent: bool = False) -> str:
    """A number as text, a dash where there is none."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if abs(value) >= 1e5 and not percent:
        return f"{value:.3e}"
    return f"{100 * value:.{digits}f} %" if percent else f"{value:.{digits}f}"


def spread_text(value: Spread | None, digits: int = 4, *, percent: bool = False, best: bool = False) -> Html:
    """Mean and standard deviation, bold where it is the best."""
    if value is None:
        return Html(DASH)
    mean = figure_text(value.mean, digits, percent=percent)
    text = shown(mean)
    if value.sd:
        sd = figure_text(value.sd, digits, percent=percent).removesuffix(" %")
        text = Html(f"{mean}<small> ± {sd}</small>")
    return element("b", text) if best else text


def signed(value: float, digits: int = 4) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−") if math.isfinite(value) else "NaN"


def p_text(value: float) -> str:
    """A p-value, as ``= 0.012``, ``< 0.0001``, or that there is none."""
    if math.isnan(value):
        return "undefined"
    return "< 0.0001" if value < 1e-4 else f"= {value:.2g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
