"""coverage.html: what W does to each kind of token, on one page that needs nothing but a browser.

Shapes: A categories of the student (rows), B categories of the teacher and one for no row (columns).
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.html.frame import document, facts, short
from xtoken.pipeline.project.coverage import EMPTY, Audit
from xtoken.pipeline.project.page_style import STYLE
from xtoken.pipeline.project.projection import EXACT, KINDS, ROLE
from xtoken.schemas.categories import CATEGORIES, NUMERALS, label
from xtoken.schemas.ui.markup import escaped

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable

EXAMPLES = 4
NUMERAL_EXAMPLES = 8  # numerals decide between P-KL and H-KL
_LONGEST = 20  # characters or bytes of a token that are shown
_FAINTEST = 0.08  # opacity of a cell just above 0, so that it shows
_SWATCHES = "".join(
    f'<svg width="10" height="10"><rect class="{kind}" width="10" height="10"/></svg> {words} &nbsp;'
    for kind, words in (("exact", "exact"), ("pieces", "pieces"), ("empty", "no row"))
)
_DARK_CELL = 0.55  # from here on a cell's number is written in the other ink


def coverage_page(audit: Audit, figures: dict[str, Any], rule: str) -> str:
    """The page for one projection.

    Args:
        audit: W and the categories of both sides.
        figures: ``coverage(audit)``.
        rule: how W was built.
    """
    student, teacher = audit.projection.student, audit.projection.teacher
    title = f"{short(student.name)} onto {short(teacher.name)}"
    body = [
        f"<header><h1>{escaped(title)}</h1>{_headline(audit, figures, rule)}</header>",
        _section(
            "Where each kind of student token goes",
            "Rows: the student's tokens by kind. Columns: the teacher's, and <i>no row</i> for tokens without weight. "
            "A cell is the share of the row's weight in percent; rows sum to 100.",
            _heat_table(weight_flow(audit)) + _legend(),
        ),
        _section(
            "Student tokens",
            "exact: a teacher token of the same bytes (specials: of the same role). pieces: any other row with weight.",
            _student_table(figures),
        ),
        _section(
            "Teacher tokens",
            "moved: reached by no row; the mass goes to the longest prefix that W does reach. lost: it goes to REST."
            + _mass_note(figures),
            _teacher_table(figures),
        ),
        _section(
            "Examples",
            "A student token, and the teacher tokens it spreads over with their weights. Tokens stand as Python "
            "literals: quotes for text, b'' for bytes that are no whole characters.",
            _example_table(audit),
        ),
    ]
    return document(title, "<main>" + "\n".join(body) + "</main>", STYLE)


def weight_flow(audit: Audit) -> NDArray[np.float64]:
    """[A, B]: share of the weight of each student category on each teacher category; the last column is no row.

    Every student token weighs the same; a category without tokens is a row of zeros.
    """
    w, size = audit.projection, len(CATEGORIES)
    flow_AB = np.zeros((size, size + 1))
    np.add.at(flow_AB, (audit.student_V[w.student_id], audit.teacher_U[w.teacher_id]), w.weight)
    empty_V = (audit.row_V == EMPTY) & (audit.student_V >= 0)
    flow_AB[:, size] = np.bincount(audit.student_V[empty_V], minlength=size)
    share_AB: NDArray[np.float64] = flow_AB / np.maximum(flow_AB.sum(axis=1, keepdims=True), 1)
    return share_AB


def readable(table: "TokenTable", token: int) -> str:
    """A token as a Python literal, not escaped: text in quotes, other bytes as b'', specials by their role."""
    if table.role[token] is not None:
        return f"<{table.role[token]}>"
    return literal(table.token(token))


def literal(data: bytes) -> str:
    """Bytes as a Python literal: text in quotes where they are whole characters; the end of a long one left out."""
    try:
        text: str | bytes = data.decode()
    except UnicodeDecodeError:
        text = data
    if len(text) <= _LONGEST:
        return repr(text)
    return f"{text[:_LONGEST]!r}… ({len(data)} bytes)"


def _headline(audit: Audit, figures: dict[str, Any], rule: str) -> str:
    rows, advice = figures["rows"], figures["advice"]
    student, teacher = audit.projection.student, audit.projection.teacher
    lines = [
        (f"{rows['exact']['share']:.1%}", f"of {student.size:,} student ids are exact"),
        (f"{rows['pieces']['share']:.1%}", "are spelt in pieces"),
        (f"{figures['columns']['moved']['share']:.1%}", f"of {teacher.size:,} teacher ids are reached by prefix only"),
        (f"{figures['overlap']['byte_strings']:,}", "byte strings in both vocabularies"),
    ]
    if audit.mass is not None:
        mass = figures["columns"]["exact"]["mass"]
        lines.insert(1, (f"{mass:.1%}", f"of the teacher's mass is on exact tokens ({audit.mass.rows:,} rows)"))
    return (
        f'<p class="advice">Advice: <b>{escaped(advice["loss"])}</b> {escaped(advice["reason"])}.</p>'
        f"{facts(lines)}"
        f"<p class=note>Student {escaped(student.name)}, tokenizer {student.hash[:12]}. "
        f"Teacher {escaped(teacher.name)}, tokenizer {teacher.hash[:12]}. "
        f"Rule {escaped(rule)}, W {audit.projection.hash[:12]}.</p>"
    )


def _section(title: str, note: str, content: str) -> str:
    return f'<section><h2>{title}</h2><p class=note>{note}</p><div class="wide">{content}</div></section>'


def _heat_table(flow_AB: NDArray[np.float64]) -> str:
    heads = "".join(f"<th scope=col><span>{_unbroken(label(name))}</span></th>" for name in (*CATEGORIES, "no row"))
    rows = [
        f"<tr><th scope=row>{label(name)}</th>{''.join(map(_heat_cell, cells))}</tr>"
        for name, cells in zip(CATEGORIES, flow_AB.tolist(), strict=True)
    ]
    return f'<table class="heat"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _unbroken(words: str) -> str:
    return words.replace("-", "&#8209;")  # a hyphen that no line ends at


def _heat_cell(share: float) -> str:
    if share == 0:
        return '<td class="zero">·</td>'
    number = f"{100 * share:.1f}" if share >= 0.0005 else "&lt;.1"
    opacity = _FAINTEST + (1 - _FAINTEST) * share
    ink = ' class="full"' if opacity > _DARK_CELL else ""
    return f'<td{ink} style="--share:{opacity:.3f}">{number}</td>'


def _legend() -> str:
    steps = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
    boxes = "".join(
        f'<rect x="{72 * at}" y="0" width="72" height="14" fill="var(--heat)" '
        f'fill-opacity="{(_FAINTEST + (1 - _FAINTEST) * step) if step else 0:.3f}"/>'
        f'<text x="{72 * at + 36}" y="30" text-anchor="middle">{100 * step:.0f} %</text>'
        for at, step in enumerate(steps)
    )
    return f'<svg class="legend" width="432" height="36" role="img" aria-label="colour scale">{boxes}</svg>'


def _student_table(figures: dict[str, Any]) -> str:
    rows = [
        [label(name), *(f"{row[key]:,}" for key in ("student", "exact", "pieces", "empty")), _bar(row)]
        for name, row in figures["categories"].items()
    ]
    return _table(["", "tokens", "exact", "pieces", "no row", _SWATCHES], rows)


def _bar(row: dict[str, int]) -> str:
    """A stacked bar of a category's rows."""
    parts, at, total = [], 0.0, max(row["student"], 1)
    for key in ("exact", "pieces", "empty"):
        width = 160 * row[key] / total
        parts.append(f'<rect class="{key}" x="{at:.1f}" width="{width:.1f}" height="12"/>')
        at += width
    return f'<svg width="160" height="12" role="img" aria-label="{row["exact"] / total:.0%}">{"".join(parts)}</svg>'


def _teacher_table(figures: dict[str, Any]) -> str:
    keys, mass = ("teacher", "matched", "in_pieces", "moved", "lost"), figures.get("mass_by_category")
    heads = ["", "tokens", "exact", "pieces only", "moved", "lost"]
    rows = [[label(name), *(f"{row[key]:,}" for key in keys)] for name, row in figures["categories"].items()]
    if mass is not None:
        heads += ["mass", "of it exact", "pieces only", "moved", "lost"]
        for row, of_category in zip(rows, mass.values(), strict=True):
            row += [f"{of_category[key]:.2%}" if of_category[key] else "–" for key in ("mass", *keys[1:])]
    moved = ", ".join(f"{label(name)} ({one['tokens']:,})" for name, one in figures["moved_into"].items())
    return _table(heads, rows) + (f"<p>Moved tokens go mostly to: {moved}.</p>" if moved else "")


def _mass_note(figures: dict[str, Any]) -> str:
    if "mass_rows" not in figures:
        return ""
    kept = figures["columns"]["not_kept"]["mass"]
    return (
        f" mass: share of the teacher's probability over {figures['mass_rows']:,} of its rows; {kept:.2%} more is on "
        "entries that were not kept."
    )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are markup already; the first of each row is its heading."""
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _example_table(audit: Audit) -> str:
    start = np.searchsorted(audit.projection.student_id, np.arange(audit.student.size + 1))
    rows = []
    for code, name in enumerate(CATEGORIES):
        for s in _examples(audit, code):
            spread = ", ".join(_entry(audit, at) for at in range(start[s], start[s + 1])) or "no row"
            kind = "empty" if audit.row_V[s] == EMPTY else KINDS[audit.row_V[s]]
            rows.append([label(name), kind, f"<code>{escaped(readable(audit.student, s))}</code>", spread])
            name = ""
    return f'<div class="examples">{_table(["", "row", "student token", "teacher tokens"], rows)}</div>'


def _examples(audit: Audit, code: int) -> list[int]:
    """Student ids of a category, spread over the vocabulary: rows that are not exact first, then one that is."""
    mine_V = audit.student_V == code
    plain_V = (audit.row_V == EXACT) | (audit.row_V == ROLE)
    limit = NUMERAL_EXAMPLES if CATEGORIES[code] in NUMERALS else EXAMPLES
    return [*_spread(np.flatnonzero(mine_V & ~plain_V), limit), *_spread(np.flatnonzero(mine_V & plain_V), 1)]


def _spread(ids: NDArray[np.int64], limit: int) -> list[int]:
    chosen: list[int] = ids[np.unique(np.linspace(0, len(ids) - 1, min(limit, len(ids))).astype(int))].tolist()
    return chosen


def _entry(audit: Audit, at: int) -> str:
    token, weight = int(audit.projection.teacher_id[at]), float(audit.projection.weight[at])
    return f"<code>{escaped(readable(audit.teacher, token))}</code>&nbsp;<small>{weight:.3f}</small>"
