"""The report in a real Chromium: it loads nothing, fits every width, and hostile texts stay texts."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from report_runs import write_run

from xtoken.schemas.configs.measure import ReportConfig
from xtoken.trainer.report.page import write_report

ATTACK = "</div></script><script>owned=1</script><img src=x onerror=owned=1><svg onload=owned=1>\u202eevil\u2066 "


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of five runs, two of them in a band, one unfinished, all hostile."""
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / f"p-kl-{seed}", "p-kl", seed, text=ATTACK) for seed in (0, 1)]
    runs += [write_run(root / "ce", "ce", text=ATTACK), write_run(root / "alm", "alm", student=ATTACK)]
    runs += [write_run(root / "dynamic", mix="dynamic", steps=120, finished=False, student="m" * 300)]
    for run in runs:
        with (Path(run) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 50, "event": "rollback", "reason": ATTACK}) + "\n")
    write_report(ReportConfig(runs=runs, out=str(root / "report.html")))
    return root / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium."""
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280, 1600])
def test_it_fits_and_loads_nothing(report: Path, browser: Browser, width: int, dark: bool) -> None:
    browser.open(report, width, dark=dark)
    assert browser.requests() == []
    assert browser.complaints() == []
    assert browser.evaluate("typeof owned") == "undefined"
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = (
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide, svg') && "
        "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert browser.evaluate(outside) == []


def test_curves_and_text_stand_out_in_light_and_dark(report: Path, browser: Browser) -> None:
    contrast = """(() => {
        const of = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
            .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b + .05; };
        const paper = of(getComputedStyle(document.body).backgroundColor);
        const ratio = colour => { const l = of(colour); return l > paper ? l / paper : paper / l; };
        const lines = [...document.querySelectorAll('.legend li path')].map(e => getComputedStyle(e).stroke);
        const texts = [...document.querySelectorAll('.grid text, .note, td')].map(e => e.closest('svg')
            ? getComputedStyle(e).fill : getComputedStyle(e).color);
        return [Math.min(...lines.map(ratio)), Math.min(...texts.map(ratio))]; })()"""
    for dark in (False, True):
        browser.open(report, dark=dark)
        lines, texts = browser.evaluate(contrast)
        assert lines >= 3, "WCAG: parts of a picture"
        assert texts >= 4.5, "WCAG: text"


def test_every_panel_draws_its_curves(report: Path, browser: Browser) -> None:
    browser.open(report)
    heights = browser.evaluate("[...document.querySelectorAll('.grid svg')].map(e => e.getBoundingClientRect().height)")
    assert len(heights) >= 18
    assert all(height > 150 for height in heights)
    drawn = "[...document.querySelectorAll('.grid svg')].every(e => e.querySelector('path[style*=\"--c\"]'))"
    assert browser.evaluate(drawn)
    labels = browser.evaluate("[...document.querySelectorAll('.grid svg')].map(e => e.getAttribute('aria-label'))")
    assert "KD, p-kl (nats per chunk) over student tokens" in labels
    assert any(label.endswith("over minutes") for label in labels)


def test_completions_are_shown_as_they_were_written(report: Path, browser: Browser) -> None:
    browser.open(report)
    texts = browser.texts("#completions .text")
    seen = ATTACK.replace("\u202e", "U+202E").replace("\u2066", "U+2066")
    assert seen * 3 in texts
    assert any("(ce wrote this)" in text for text in texts)
