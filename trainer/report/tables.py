"""Figures as tables for a terminal."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from schemas.progress import brief

_SHORT = 24


def figure_tables(figures: dict[str, Any]) -> list[Table]:
    """A table of the plain figures, then one of each list or dictionary of rows."""
    plain = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    nested: list[Table] = []
    for key, value in figures.items():
        if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
            value = [{key: name.replace("_", " "), **row} for name, row in value.items()]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            nested.append(_rows_table(value))
        else:
            plain.add_row(key.replace("_", " "), _cell(value))
    return [plain, *nested]


def _rows_table(rows: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in columns:
        cells = [_cell(row.get(name, "")) for row in rows]
        numeric = all(isinstance(row.get(name, 0), int | float) for row in rows)
        # Only long columns may wrap, or they squeeze the short ones to nothing.
        longest = max(len(line) for cell in cells for line in cell.split("\n"))
        justify: Any = "right" if numeric else "left"
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=not numeric and longest <= _SHORT)
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in columns))
    return table


def _cell(value: Any) -> str:
    if value in ({}, []):
        return "none"
    if isinstance(value, dict):
        return "\n".join(f"{name.replace('_', ' ')}: {_inline(item)}" for name, item in value.items())
    return _inline(value)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_inline(item)}" for name, item in value.items())
    return "|".join(map(_inline, value)) if isinstance(value, list) else escape(brief(value).replace("\n", "\\n"))
