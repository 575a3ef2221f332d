"""Figures as tables for a terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xtoken.schemas.ui.progress import brief

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
            nested += _rows_tables(value)
        else:
            plain.add_row(key.replace("_", " "), _cell(value))
    return [plain, *nested]


def _rows_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """The rows, in as many tables as the terminal is too narrow for; each begins with the first column."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return []
    first, *others = names
    taken = {name: _least_width(rows, name) + 1 for name in names}
    parts, room = [[first]], Console().width - 1 - taken[first]
    for name in others:
        if taken[name] > room and len(parts[-1]) > 1:
            parts.append([first])
            room = Console().width - 1 - taken[first]
        parts[-1].append(name)
        room -= taken[name]
    return [_rows_table(rows, columns) for columns in parts]


def _rows_table(rows: list[dict[str, Any]], columns: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in columns:
        justify: Any = "right" if _is_numeric(rows, name) else "left"
        width = _least_width(rows, name)
        table.add_column(name.replace("_", " "), justify=justify, no_wrap=_is_short(rows, name), min_width=width)
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in columns))
    return table


def _is_numeric(rows: list[dict[str, Any]], name: str) -> bool:
    return all(isinstance(row.get(name, 0), int | float) for row in rows)


def _is_short(rows: list[dict[str, Any]], name: str) -> bool:
    """Only long texts, and the titles of numbers, may wrap, or they squeeze the short ones to nothing."""
    return not _is_numeric(rows, name) and _longest(rows, name) <= _SHORT


def _longest(rows: list[dict[str, Any]], name: str) -> int:
    return max(len(line) for row in rows for line in _cell(row.get(name, "")).split("\n"))


def _least_width(rows: list[dict[str, Any]], name: str) -> int:
    """Letters that a column needs: a number is never cut, a long text may wrap."""
    words = [name] if _is_short(rows, name) else name.split("_")
    return max(min(_longest(rows, name), _SHORT), *map(len, words))


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
