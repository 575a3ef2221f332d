"""The page as text: what it says of runs of every kind."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import write_lines, write_run

from xtoken.schemas.configs.measure import ReportConfig
from xtoken.schemas.errors import XtokenError
from xtoken.trainer.report.markup import Html, element, p_text, shown, table
from xtoken.trainer.report.page import write_report

VOID = {"meta", "link", "br"}


class Checked(HTMLParser):
    """Fails on elements that are not closed in order; collects tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path, *runs: str) -> tuple[str, dict[str, object]]:
    """The page and the figures."""
    figures = write_report(ReportConfig(runs=list(runs), out=str(folder / "out" / "report.html")))
    return (folder / "out" / "report.html").read_text(), figures


def test_two_losses_with_two_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{loss}{seed}", loss, seed, steps=120) for loss in ("p-kl", "ce") for seed in (0, 1)]
    text, figures = report(tmp_path, *runs)
    page = Checked(text)
    assert (figures["runs"], figures["groups"]) == (4, 2)
    rows = figures["results"]
    assert isinstance(rows, list)
    assert rows[0]["configuration"] == "p-kl"
    assert rows[0]["difference"] < 0
    assert rows[0]["p"] < 0.01
    assert "difference" not in rows[1]
    json.dumps(figures, allow_nan=False)
    said = page.text
    wanted = (
        "p-kl has the lowest held-out bits per byte|more than chance explains|60 documents|baseline|Over seeds|torch|"
    )
    wanted += (
        "1-digit numerals|the teacher itself|1.4100|What differs|what truly follows|/data/targets --loss p-kl --seed 1"
    )
    for words in wanted.split("|"):
        assert words in said, words
    assert page.tags.count("svg") >= 15
    assert "script" not in page.tags
    assert "http" not in re.sub(r'<meta http-equiv="[^"]+"', "", text)


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    assert report(tmp_path, run)[0] == report(tmp_path, run)[0]


def test_runs_without_an_end_without_held_out_data_and_of_one_step(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "cut", "p-kl", steps=130, finished=False),
        write_run(tmp_path / "blind", "alm", steps=30, held_out=False),
        write_run(tmp_path / "one", "h-kl", steps=1),
    ]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "run.json").write_text('{"identity": {"loss": ["ce"]}}')
    text, figures = report(tmp_path, *runs, str(tmp_path / "nothing"))
    page = Checked(text)
    assert "at step 100" in page.text
    assert "1, 0 finished" in page.text
    assert "No test over documents" in page.text
    assert "No test over seeds" in page.text
    assert figures["groups"] == 4
    alone, _ = report(tmp_path, str(tmp_path / "nothing"))
    assert "No run has taken a step yet" in Checked(alone).text
    assert "No run was measured on held-out data" in Checked(alone).text


def test_conversations(tmp_path: Path) -> None:
    """How many tokens are taught, and figures by what a conversation holds."""
    run, text_run = write_run(tmp_path / "run", "p-kl", steps=20), write_run(tmp_path / "text", "ce", steps=20)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = {"assistant": {"bits_per_byte": 1.25, "bytes": 10}, "stop": {"bits_per_token": 0.75, "tokens": 3}}
    for line in lines:
        line |= {"by_kind": kinds} if "eval" in line else {"taught": 0.4375}
    write_lines(path, lines)
    text = report(tmp_path, run, text_run)[0]
    page = Checked(text)
    assert ", 44 % taught" in page.text
    assert page.text.count("% taught") == 1, "text has no such share"
    assert "taught tokens of conversations" in page.text
    for said in (
        "Bits per byte by what a conversation holds",
        "assistant",
        "1.25",
        "Bits per token of what has no bytes",
    ):
        assert said in page.text
    assert "by what a conversation holds" not in report(tmp_path, text_run)[0]


def test_figures_that_are_no_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "p-kl", steps=2, held_out=False, finished=False)
    nan = [
        {"step": step, "tokens": 9 * step, "seconds": 1.0, "loss": float("nan"), "kd": float("inf"), "ce": 2.0}
        for step in (1, 2)
    ]
    write_lines(
        tmp_path / "run" / "metrics.jsonl", [*nan, {"step": 2, "eval": "after", "kl": float("nan"), "bytes": 1}]
    )
    text, figures = report(tmp_path, run, write_run(tmp_path / "ce", "ce", steps=2))
    page = Checked(text)
    assert "NaN" in page.text
    json.dumps(figures, allow_nan=False)


def test_what_runs_hold_is_escaped_everywhere(tmp_path: Path) -> None:
    named = "<img src=x onerror=owned=1>'\"&\u202e\x00"
    evil = f"{named}\ud800"
    runs = [
        write_run(tmp_path / str(at), steps=3, text=evil, documents=3, student=f"{named}{at}", **{named: at})
        for at in range(2)
    ]
    for root in map(Path, runs):
        run = json.loads((root / "run.json").read_text())
        run |= {evil: evil, "argv": [evil, 7], "environment": {evil: evil}}
        (root / "run.json").write_text(json.dumps(run))
        sources = {evil: {"bits_per_byte": 1.0}}
        lines = [
            {"step": 3, "eval": "after", "bits_per_byte": 1.0, "by_source": sources, "by_category": {evil: {"kl": 1.0}}}
        ]
        lines += [{"step": 1, "event": evil, evil: evil}]
        with (root / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
    text, _ = report(tmp_path, *runs)
    page = Checked(text)
    assert "img" not in page.tags
    assert "<img src=x onerror=owned=1>" in page.text
    assert not {"\u202e", "\x00"} & set(text)
    assert "U+202E" in page.text
    assert "U+D800" in page.text


def test_refusals(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    with pytest.raises(XtokenError, match="named twice"):
        report(tmp_path, run, f"{tmp_path}/./run")
    with pytest.raises(XtokenError, match="is not a training run"):
        report(tmp_path, run, str(tmp_path))
    half = write_run(tmp_path / "half", steps=1, student="\ud800")
    with pytest.raises(XtokenError, match=r"run\.json is damaged"):
        report(tmp_path, half)
    with pytest.raises(XtokenError, match="is a URL"):
        write_report(ReportConfig(runs=[run], out="s3://bucket/report.html"))
    with pytest.raises(XtokenError, match="another --out"):
        write_report(ReportConfig(runs=[run], out=run))
    assert not list(tmp_path.glob(".*.tmp"))


def test_markup() -> None:
    assert element("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'
    assert element("p", Html("<b>x</b>")) == "<p><b>x</b></p>"
    assert shown("é\t") == '<bdi>é<i class="sign">TAB</i></bdi>'
    assert "3,000 more characters" in shown("x" * 5000)
    assert "&lt;i&gt;" in table(["<i>"], [["<i>", "<i>"]])
    assert [p_text(p) for p in (0.5, 0.012345, 1e-9, float("nan"))] == ["= 0.5", "= 0.012", "< 0.0001", "undefined"]
