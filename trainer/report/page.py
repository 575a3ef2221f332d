"""``xtoken report``: runs as one HTML page that loads nothing and needs no script."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from xtoken.schemas.configs.measure import ReportConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.atomic import write_text
from xtoken.trainer.report.curves import draw, legend
from xtoken.trainer.report.details import (
    breakdown_section,
    completions_section,
    differences_section,
    events_table,
    foot_section,
)
from xtoken.trainer.report.groups import Group, group_runs
from xtoken.trainer.report.markup import Html, element, join, note, section, shown
from xtoken.trainer.report.run_folder import read_run
from xtoken.trainer.report.series import Panel, panels, window_of
from xtoken.trainer.report.verdict import Verdict, tests_section, verdict_section


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Draw ``config.runs`` as ``config.out``; the same runs give the same bytes.

    Returns:
        ``page``, ``runs``, ``groups`` and ``results``: a row per configuration, see ``Verdict.rows``.

    Raises:
        XtokenError: a folder is not a training run, is named twice or holds what no run writes; the page cannot be
            written; matplotlib or scipy is not installed.
    """
    named: dict[Path, str] = {}
    for root in config.runs:
        before = named.setdefault(Path(root).absolute(), root)
        if before is not root:
            raise XtokenError(f"{root} is named twice ({before}), which would count as two seeds; name each run once")
    verdict = Verdict(group_runs([read_run(root) for root in config.runs]))
    _publish(config.out, page(verdict))
    return {"page": config.out, "runs": len(config.runs), "groups": len(verdict.groups), "results": verdict.rows()}


def page(verdict: Verdict) -> str:
    """The whole document."""
    groups = verdict.groups
    runs = sum(len(group.runs) for group in groups)
    title = f"{'; '.join(group.label for group in groups[:4])}{'; and others' if len(groups) > 4 else ''}"
    body = join(
        [
            element("h1", f"Training report: {title}"),
            note(f"{runs} run{'s' * (runs != 1)}, {len(groups)} configuration{'s' * (len(groups) != 1)}"),
            verdict_section(verdict),
            tests_section(verdict),
            _curves_section(groups),
            breakdown_section(groups),
            differences_section(groups),
            completions_section(groups),
            foot_section(groups),
        ]
    )
    plain_title = shown(f"Training report: {title}").replace("<bdi>", "").replace("</bdi>", "")
    return Template(_asset("page.html")).substitute(title=plain_title, style=_asset("page.css"), body=body)


def _curves_section(groups: Sequence[Group]) -> Html:
    parts: list[str] = []
    for over, prefix in (("tokens", "t"), ("seconds", "s")):
        drawn = panels(groups, over)
        if drawn:
            title = "Over student tokens" if over == "tokens" else "Over time in steps"
            parts += [
                element("h3", title),
                _legend(groups, drawn),
                element("div", join(draw(drawn, prefix)), class_="grid"),
            ]
    if not parts:
        return section("Curves", note("No run has taken a step yet, and none was measured."), id_="curves")
    window = window_of(groups)
    mean = f"Each point is the mean of {window} steps around it. " if window > 1 else ""
    text = f"{mean}Runs that differ in their seed only are one line, the mean, in a band of one standard deviation."
    return section("Curves", note(text), *parts, events_table(groups), id_="curves")


def _legend(groups: Sequence[Group], drawn: Sequence[Panel]) -> Html:
    goal, events = any(panel.goals for panel in drawn), any(panel.events for panel in drawn)
    return legend([group.label for group in groups], goal=goal, events=events)


def _asset(name: str) -> str:
    return files("xtoken.trainer.report").joinpath(name).read_text(encoding="utf-8")


def _publish(out: str, text: str) -> None:
    if "://" in out:
        raise XtokenError(f"out={out!r} is a URL; the page is one local file, copy it from there")
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise XtokenError(f"the report cannot be written to {out} ({error}); name another --out") from error
