"""Figures as tables for a terminal."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from schemas.progress import brief

_SHORT = 24
_ROWS = 40  # of a table that a terminal is shown
_LETTERS = 400  # of a text in a table that a terminal is shown


def shown(figures: dict[str, Any]) -> list[Table | str]:
    """What a terminal is shown of figures: tables, of long ones the first rows and how many more there are."""
    short = {name: _first_rows(value) if isinstance(value, list) else value for name, value in figures.items()}
    long = {name: len(value) - _ROWS for name, value in figures.items() if isinstance(value, list)}
    more = [f"{name.replace('_', ' ')}: {rows} more, which --json has" for name, rows in long.items() if rows > 0]
    return [*figure_tables(short), *more]


def _first_rows(rows: list[Any]) -> list[Any]:
    return [{k: _beginning(v) for k, v in row.items()} if isinstance(row, dict) else row for row in rows[:_ROWS]]


def _beginning(value: Any) -> Any:
    return f"{value[:_LETTERS]} ..." if isinstance(value, str) and len(value) > _LETTERS else value


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
