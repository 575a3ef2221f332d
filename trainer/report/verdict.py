"""The report's first two sections: which configuration is best, and whether the difference is more than chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from xtoken.trainer.report.groups import Group, Spread, baseline, comparable
from xtoken.trainer.report.markup import (
    DASH,
    Html,
    duration,
    element,
    figure_text,
    join,
    note,
    p_text,
    section,
    shown,
    signed,
    spread_text,
    table,
)
from xtoken.trainer.report.paired import Paired, compare, over_documents, over_seeds

BPB, KL, TOP1 = "bits_per_byte", "kl", "top1_agreement"
_LESS_IS_BEST = {BPB: True, KL: True, TOP1: False}
_MEASURED_ON = {BPB: "The held-out text", KL: "What the held-out targets count"}
_SIGNIFICANT = 0.05
_SEED_TESTS = ((BPB, "bits per byte"), (KL, "KL to the teacher"), (TOP1, "top-1 agreement"))
_NOTE = (
    "Mean ± standard deviation over seeds. Loss, KD and CE are means of the last ten steps, in nats; KD and "
    "loss compare between runs of the same loss only. Time counts steps, not evaluations."
)
_UNMEASURED = "No run was measured on held-out data: --eval-text and --eval-targets of 'xtoken train' do that."
_DOCUMENTS_NOTE = (
    "Bits per byte of each held-out document after training, mean over seeds first, minus the baseline's. Each "
    "document counts the same, however long, so the mean is not exactly the difference of the table above; windows of "
    "one document are added up. The test says whether the difference would hold on other documents of this corpus "
    "for these very runs. It does not say that it holds on other text, nor with other seeds."
)
_SEEDS_NOTE = (
    "Figures of runs with the same seed, minus the baseline's. The test says whether the difference would hold with "
    "other seeds, on this held-out data. With two or three seeds only large differences can be told from chance, and "
    "Wilcoxon's test cannot reach p = 0.05 with fewer than six."
)
_HOLM_NOTE = (
    "p-values in the columns after Holm's correction are raised for the number of configurations compared with the "
    "baseline within one table and figure; figures are not corrected for each other. Intervals are 95 %, by Student's "
    "t, and not corrected. Differences to each other of configurations that are not the baseline are not tested."
)


@dataclass(frozen=True)
class Verdict:
    """Groups, the one they are compared with, and the tests."""

    groups: Sequence[Group]

    @cached_property
    def base(self) -> Group:
        """What others are compared with."""
        return baseline(self.groups)

    @cached_property
    def documents(self) -> dict[str, Paired]:
        """Label -> test over held-out documents."""
        return compare(self.groups, self.base, over_documents)

    @cached_property
    def seeds(self) -> dict[str, dict[str, Paired]]:
        """Figure -> label -> test over seeds."""
        return {name: compare(self.groups, self.base, partial(over_seeds, name=name)) for name, _ in _SEED_TESTS}

    @cached_property
    def best(self) -> dict[str, Group | None]:
        """Figure -> the group with the best one, of those measured at their end; None if nothing was compared."""
        best: dict[str, Group | None] = {}
        for name, less in _LESS_IS_BEST.items():
            same = all(comparable(group, self.base, name) for group in self.groups)
            measured = [(group.held_out("after", name), group) for group in self.groups if same]
            known = [(s.mean, group) for s, group in measured if s is not None and math.isfinite(s.mean)]
            pick = min if less else max
            best[name] = pick(known, key=lambda one: one[0])[1] if len(known) > 1 else None
        return best

    def difference(self, group: Group) -> float | None:
        """Bits per byte after training, minus the baseline's."""
        ours, base = group.held_out("after", BPB), self.base.held_out("after", BPB)
        if group is self.base or ours is None or base is None or not comparable(group, self.base, BPB):
            return None
        return ours.mean - base.mean

    def main_test(self, group: Group) -> tuple[Paired, str] | None:
        """The test shown beside a group's figures, and what its pairs are."""
        for tests, what in ((self.documents, "documents"), (self.seeds[BPB], "seeds")):
            if group.label in tests:
                return tests[group.label], what
        return None

    def rows(self) -> list[dict[str, Any]]:
        """A row of plain figures per group; what is unknown, NaN or inf is left out."""
        return [_plain_row(self, group) for group in self.groups]


def verdict_section(verdict: Verdict) -> Html:
    """The table, with a sentence that says the same."""
    groups = verdict.groups
    measured = any(run.evaluations for group in groups for run in group.runs)
    parts = [_measured_table(verdict)] if measured else [note(_UNMEASURED)]
    head = ["configuration", "steps", "tokens", "time", "loss", "KD", "CE"]
    parts.append(table(head, [_trained(group) for group in groups], over=[("training", 4), ("at its end", 3)]))
    return section("Verdict", _sentence(verdict), *parts, note(_NOTE), id_="verdict")


def _measured_table(verdict: Verdict) -> Html:
    head = ["configuration", "seeds", "before", "after", f"after − {verdict.base.label}", "paired test"]
    over = [("", 2), ("held-out bits per byte", 4), ("held-out targets", 2)]
    rows = [[group.label, _seeds(group), *_measured(verdict, group)] for group in verdict.groups]
    goals = sorted({goal for group in verdict.groups if (goal := group.teacher()) is not None})
    rows += [[Html("<i>the teacher itself</i>"), "", "", figure_text(goal), *[""] * 4] for goal in goals]
    apart = [
        what
        for name, what in _MEASURED_ON.items()
        if not all(comparable(g, verdict.base, name) for g in verdict.groups)
    ]
    parts = [table([*head, "KL to the teacher", "top-1 agreement"], rows, over=over)]
    return join(
        [*parts, *(note(f"{what} differs between configurations: its figures are not compared.") for what in apart)]
    )


def tests_section(verdict: Verdict) -> Html:
    """Every paired test in words and numbers; says why where there is none."""
    if len(verdict.groups) < 2:
        return Html("")
    base = verdict.base.label
    parts: list[str] = [element("p", join([Html("Everything is compared with "), element("b", base), Html(".")]))]
    if verdict.documents:
        words = [_words(label, base, test) for label, test in verdict.documents.items()]
        rows = [_test_row(label, test) for label, test in verdict.documents.items()]
        parts += [element("h3", "Over held-out documents"), _list(words), _test_table(rows, "documents")]
        parts.append(note(_DOCUMENTS_NOTE))
    else:
        parts.append(note("No test over documents: fewer than two held-out documents were measured in both."))
    rows = [
        _test_row(f"{label}: {title}", test)
        for name, title in _SEED_TESTS
        for label, test in verdict.seeds[name].items()
    ]
    if rows:
        parts += [element("h3", "Over seeds"), _test_table(rows, "seeds"), note(_SEEDS_NOTE)]
    else:
        parts.append(note("No test over seeds: no two seeds were run to the end in both configurations."))
    return section("Paired tests", *parts, note(_HOLM_NOTE) if rows or verdict.documents else "", id_="tests")


def _sentence(verdict: Verdict) -> Html:
    best, base = verdict.best[BPB], verdict.base
    if best is None:
        return Html("")
    parts = [
        element("b", best.label),
        Html(" has the lowest held-out bits per byte, "),
        _mean(best.held_out("after", BPB)),
    ]
    if best is not base:
        parts += [Html(f"; {shown(base.label)} has "), _mean(base.held_out("after", BPB))]
        tested = verdict.main_test(best)
        if tested is not None:
            parts.append(Html(f". {_judgement(tested[0])} over {tested[0].n:,} {tested[1]}"))
    if (goal := best.teacher()) is not None:
        parts.append(Html(f". The teacher itself has {figure_text(goal)}"))
    return element("p", join([*parts, Html(".")]), class_="lead")


def _mean(value: Spread | None) -> str:
    return spread_text(value)


def _judgement(test: Paired) -> str:
    p = p_text(test.holm_t)
    told = "The difference is more than chance explains" if _told_apart(test) else "The test does not tell them apart"
    return f"{told} (paired t-test, p {p})"


def _told_apart(test: Paired) -> bool:
    return test.holm_t < _SIGNIFICANT


def _seeds(group: Group) -> str:
    runs = len(group.runs)
    return str(runs) if group.finished == runs else f"{runs}, {group.finished} finished"


def _trained(group: Group) -> list[str]:
    runs = group.runs
    steps = sorted({run.steps for run in runs})
    count = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    tokens, seconds = ([getattr(run, name) for run in runs] for name in ("tokens", "seconds"))
    losses = [spread_text(group.final(name), 3) for name in ("loss", "kd", "ce")]
    taught = group.final("taught")  # of conversations
    share = "" if taught is None else f", {100 * taught.mean:.0f} % taught"
    means = [f"{sum(tokens) / len(runs):,.0f}{share}", duration(sum(seconds) / len(runs))]
    return [group.label, count, *means, *losses]


def _measured(verdict: Verdict, group: Group) -> list[str]:
    last = group.last()
    cells = {
        name: spread_text(
            group.held_out(last, name),
            percent=name == TOP1,
            best=verdict.best[name] is group,
            digits=2 if name == TOP1 else 4,
        )
        for name in _LESS_IS_BEST
    }
    unfinished = group.evaluations("latest")
    if last == "latest" and unfinished:
        step = max(one.step for one in unfinished)
        cells = {
            k: cell if cell == DASH else Html(f"{cell}<small> at step {step:,}</small>") for k, cell in cells.items()
        }
    difference, test = verdict.difference(group), verdict.main_test(group)
    shown_test = DASH if test is None else f"p {p_text(test[0].holm_t)}, {test[0].n:,} {test[1]}"
    compared = "baseline" if group is verdict.base else (DASH if difference is None else signed(difference))
    return [spread_text(group.held_out("before", BPB)), cells[BPB], compared, shown_test, cells[KL], cells[TOP1]]


def _words(label: str, base: str, test: Paired) -> Html:
    name, other = element("b", label), shown(base)
    if not test.difference:
        return Html(f"{name} and {other} take the same bits on every document.")
    less = "less" if test.difference < 0 else "more"
    low, high = sorted((abs(test.low), abs(test.high)))
    if test.low < 0 < test.high:
        between = f"95 % interval: from {-min(test.low, 0):.4f} less to {max(test.high, 0):.4f} more"
    else:
        between = f"95 % interval: {low:.4f} to {high:.4f}"
    p = f"p {p_text(test.holm_t)} by the t-test, {p_text(test.holm_wilcoxon)} by Wilcoxon's"
    told = "" if _told_apart(test) else f" The t-test does not tell them apart: {test.n:,} documents may be too few."
    return Html(
        f"{name} takes {abs(test.difference):.4f} bits per byte {less} than {other} on the mean of {test.n:,} "
        f"documents ({between}; {p}).{told}"
    )


def _list(items: Sequence[Html]) -> Html:
    return element("ul", join(element("li", item) for item in items))


def _test_row(label: str, test: Paired) -> list[str]:
    interval = f"{signed(test.low)} to {signed(test.high)}"
    ps = [p_text(p).removeprefix("= ") for p in (test.p_t, test.holm_t, test.p_wilcoxon, test.holm_wilcoxon)]
    return [label, f"{test.n:,}", signed(test.difference), interval, *ps]


def _test_table(rows: Sequence[Sequence[str]], pairs: str) -> Html:
    head = ["", pairs, "mean difference", "95 % interval", "p", "after Holm", "p", "after Holm"]
    return table(head, rows, over=[("", 4), ("paired t-test", 2), ("Wilcoxon", 2)])


def _plain_row(verdict: Verdict, group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"configuration": group.label, "seeds": len(group.runs), "finished": group.finished}
    row["steps"] = max(run.steps for run in group.runs)
    row["tokens"] = round(sum(run.tokens for run in group.runs) / len(group.runs))
    figures: dict[str, float | None] = {}
    for name in ("loss", "kd", "ce"):
        final = group.final(name)
        figures[name] = None if final is None else final.mean
    for name in _LESS_IS_BEST:
        held = group.held_out("after", name)
        figures[name] = None if held is None else held.mean
    test = verdict.main_test(group)
    figures |= {"difference": verdict.difference(group), "p": None if test is None else test[0].holm_t}
    return row | {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
