"""What a terminal is shown: no number is cut, however narrow it is."""

import io

import pytest
from rich.console import Console

from xtoken.schemas.ui.tables import shown

ROWS = [
    {
        "configuration": f"loss-{at}",
        "a_title_that_is_long": "a",
        **{f"a_long_figure_{n}": 1.2345 + at + n for n in range(12)},
    }
    for at in range(3)
]


def printed(figures: dict[str, object]) -> str:
    console = Console(file=io.StringIO())
    console.print(*shown(figures), sep="\n")
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 300])
def test_a_wide_table_is_several(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = printed({"results": ROWS})
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for row in ROWS:
        for value in row.values():
            if isinstance(value, float):
                assert text.count(f" {value:.4g}") >= 1
    parts = sum(line.split()[:1] == ["loss-0"] for line in lines)
    assert parts == sum(line.split()[:1] == ["loss-2"] for line in lines)
    assert "a title that is long" in text
    assert (parts > 1) == (width < 300)
    assert "…" not in text


def test_rows_without_columns_and_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert printed({"results": [{}]}).strip() == ""
    text = printed({"rows": [{"name": "a", "text": "word " * 30, "n": 12345}]})
    assert text.count("word") == 30
    assert "12,345" in text
