"""The report's other sections: held-out figures by source and category, what differs, completions, the foot."""

import json
import math
import shlex
from collections.abc import Sequence
from typing import Any

from xtoken.schemas.categories import CATEGORIES, label
from xtoken.trainer.report.groups import Group, Spread, differences, shortened, spread
from xtoken.trainer.report.markup import Html, element, join, note, section, shown, spread_text, table
from xtoken.trainer.report.run_folder import Completion, RunRecord

_MOST_ROWS = 200
_MOST_SAMPLES = 20
_BREAKDOWNS = (
    ("by_source", "bits_per_byte", "Bits per byte by source", True, False),
    ("by_kind", "bits_per_byte", "Bits per byte by what a conversation holds", True, False),
    ("by_kind", "bits_per_token", "Bits per token of what has no bytes, such as the end of an answer", True, False),
    ("by_category", "kl", "KL to the teacher by category, nats per chunk", True, False),
    ("by_category", "top1_agreement", "Top-1 agreement with the teacher by category", False, True),
)
_Row = dict[str, Spread]


def breakdown_section(groups: Sequence[Group]) -> Html:
    """Tables by source and by category of a chunk's first token, numerals first; empty where no run has them."""
    tables = []
    for kind, name, title, less, percent in _BREAKDOWNS:
        drawn = _breakdown(groups, kind, name, less=less, percent=percent)
        if drawn:
            tables += [element("h3", title), drawn]
    text = (
        "After training, mean over seeds; the best in bold. Sources are those of the held-out text, categories those "
    )
    text += "of the teacher's next token."
    return section("Held-out data in parts", *tables, note(text), id_="parts") if tables else Html("")


def _breakdown(groups: Sequence[Group], kind: str, name: str, *, less: bool, percent: bool) -> Html:
    after = [_by_key(group, group.last(), kind, name) for group in groups]
    before = [_by_key(group, "before", kind, name) for group in groups]
    keys = _ordered({key for row in (*after, *before) for key in row}, kind)
    if not keys:
        return Html("")
    columns: list[tuple[str, _Row]] = []
    means = [{key: value.mean for key, value in row.items()} for row in before]
    if any(means) and all(row == means[0] for row in means):
        columns = [("before", {key: Spread(mean, None, 1) for key, mean in means[0].items()})]
    elif any(means):
        columns = [(f"{group.label}, before", row) for group, row in zip(groups, before, strict=True) if row]
    finished = [group.last() == "after" for group in groups]
    heads = [g.label if done else f"{g.label}, unfinished" for g, done in zip(groups, finished, strict=True)]
    compared = list(zip(heads, after, strict=True))
    digits = 1 if percent else 4
    rows = []
    for key in keys[:_MOST_ROWS]:
        best = _best(
            [row[key].mean for row, done in zip(after, finished, strict=True) if done and key in row], less=less
        )
        cells = [spread_text(row.get(key), digits, percent=percent) for _, row in columns]
        cells += [
            spread_text(row.get(key), digits, percent=percent, best=key in row and row[key].mean == best)
            for _, row in compared
        ]
        rows.append([label(key) if kind == "by_category" else key or "(none)", *cells])
    more = note(f"{len(keys) - _MOST_ROWS:,} more are not shown.") if len(keys) > _MOST_ROWS else ""
    first = kind.removeprefix("by_")
    return join([table([first, *(title for title, _ in (*columns, *compared))], rows), more])


def _best(values: Sequence[float], *, less: bool) -> float | None:
    """The best value, None where nothing is better than the rest."""
    known = {value for value in values if math.isfinite(value)}
    return None if len(known) < 2 else (min(known) if less else max(known))


def _by_key(group: Group, when: str, kind: str, name: str) -> _Row:
    values: dict[str, list[float]] = {}
    for evaluation in group.evaluations(when):
        parts: dict[str, dict[str, float]] = getattr(evaluation, kind)
        for key, figures in parts.items():
            if name in figures:
                values.setdefault(key, []).append(figures[name])
    return {key: value for key, of_seeds in values.items() if (value := spread(of_seeds)) is not None}


def _ordered(keys: set[str], kind: str) -> list[str]:
    known = {name: at for at, name in enumerate(CATEGORIES)} if kind == "by_category" else {}
    return sorted(keys, key=lambda key: (known.get(key, len(known)), key))


def differences_section(groups: Sequence[Group]) -> Html:
    """The fields that are not the same everywhere."""
    differing = differences(groups)
    seeds = ["seeds", *(", ".join(str(run.seed) for run in group.runs) for group in groups)]
    rows = [seeds, *([name.replace("_", " "), *values] for name, values in differing.items())][:_MOST_ROWS]
    text = "Fields that are the same in all runs are left out; hashes are cut to eight digits."
    return section("What differs", table(["", *(g.label for g in groups)], rows), note(text), id_="differences")


def completions_section(groups: Sequence[Group]) -> Html:
    """What students write after the beginnings of held-out samples, of the first run of each configuration."""
    writers = [(group, next((run for run in group.runs if run.completions), None)) for group in groups]
    written = [(group.label, run) for group, run in writers if run is not None]
    samples = list(dict.fromkeys(one.sample for _, run in written for one in run.completions))
    if not samples:
        return Html("")
    blocks = [_sample(sample, written) for sample in samples[:_MOST_SAMPLES]]
    text = "Of each configuration the run with the lowest seed. Signs in frames stand for characters that no eye sees."
    if len(samples) > _MOST_SAMPLES:
        text += f" {len(samples) - _MOST_SAMPLES:,} more samples are not shown."
    return section("Completions", note(text), *blocks, id_="completions")


def _sample(sample: str, written: Sequence[tuple[str, RunRecord]]) -> Html:
    of: dict[str, dict[str, Completion]] = {}
    for name, run in written:
        for one in run.completions:
            if one.sample == sample:
                of.setdefault(one.when, {})[name] = one
    first = next(one for by_label in of.values() for one in by_label.values())
    before, after = of.get("before", {}), of.get("after", {})
    boxes = [_box("what truly follows", first.text)] if first.text else []
    if len({one.completion for one in before.values()}) == 1:
        boxes.append(_box("before", next(iter(before.values())).completion))
        before = {}
    for name in dict.fromkeys((*before, *after)):
        boxes += [
            _box(f"{name}, {when}", had[name].completion)
            for when, had in (("before", before), ("after", after))
            if name in had
        ]
    head = element("h3", sample)
    return element("article", join([head, _box("prompt", first.prompt), element("div", join(boxes), class_="boxes")]))


def _box(title: str, text: str) -> Html:
    content = element("div", text, class_="text", dir="auto") if text else note("nothing")
    return element("div", join([element("h4", title), content]), class_="box")


def events_table(groups: Sequence[Group]) -> Html:
    """What happened to runs, empty where nothing did."""
    rows = [
        [group.label, str(run.seed), f"{event.step:,}", event.name, _details(event.details)]
        for group in groups
        for run in group.runs
        for event in run.events
    ]
    if not rows:
        return Html("")
    more = note(f"{len(rows) - _MOST_ROWS:,} more are not shown.") if len(rows) > _MOST_ROWS else ""
    head = ["configuration", "seed", "step", "event", ""]
    return join([element("h3", "Events"), table(head, rows[:_MOST_ROWS]), more])


def _details(details: dict[str, Any]) -> str:
    plain = ((name, value if isinstance(value, str) else shortened(value)) for name, value in details.items())
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plain)


def foot_section(groups: Sequence[Group]) -> Html:
    """Versions, device and machine, and the commands."""
    runs = [run for group in groups for run in group.runs]
    held = [dict(_flat({k: v for k, v in run.provenance.items() if k != "argv"})) for run in runs]
    names = list(dict.fromkeys(name for one in held for name in one))
    device = {"device": " | ".join(dict.fromkeys(str(run.config["device"]) for run in runs if "device" in run.config))}
    facts = {name: " | ".join(dict.fromkeys(one.get(name, "none") for one in held)) for name in names}
    rows = [[name.replace("_", " "), value] for name, value in ((device | facts).items()) if value][:_MOST_ROWS]
    commands = [_command(group, run) for group in groups for run in group.runs]
    return section(
        "How it was made", table(["", ""], rows), element("h3", "Commands"), element("ul", join(commands)), id_="made"
    )


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict) and not before:
            pairs += _flat(value, f"{name} ")
        else:
            pairs.append((before.replace("environment ", "") + name, shortened(value)))
    return pairs


def _command(group: Group, run: RunRecord) -> Html:
    argv = run.provenance.get("argv")
    words = shlex.join(map(str, argv)) if isinstance(argv, list) else json.dumps(argv)
    state = "" if run.summary is not None else f", not finished: at step {run.steps:,}"
    what = f"{group.label}, seed {run.seed}{state}: {run.root}"
    return element("li", join([shown(what), Html("<br>"), element("code", words)]))
