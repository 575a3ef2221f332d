"""Training on conversations against its definition: sample by sample and position by position, dense, in float64."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import xtoken.trainer.blocks as blocks_module
from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.data.batches import Loader, StepBatch
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.diagnosis import single_samples
from xtoken.trainer.losses import open_loss, reference
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.mixing import Mixing
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.score import score
from xtoken.trainer.step import Figures, count_step, run_step
from xtoken.trainer.student.model import load_student

LENGTHS = [[25, 31, 12, 18], [40, 22]]
MAX_TOKENS = 33  # cuts the longest
STEP = 1 / 64
KD, CE = 0.7, 0.3
THRESHOLD = 0.3
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in LOSSES if name != "ce"}
CASES |= {"alm joined": ("alm", {"debias": ["outcome", "merge"], "alm_threshold": THRESHOLD})}
CASES |= {"alm outcome": ("alm", {"debias": ["outcome"]}), "p-kl drop": ("p-kl", {"rest": "drop"})}


def student_of(folder: str) -> Student:
    return Student(load_student(folder, torch.device("cpu"), False).double(), torch.device("cpu"), None, 24)


def batch_of(roots: Sequence[str], losses: Sequence[Loss], micro_tokens: int = 80, packing: bool = False) -> StepBatch:
    weights = tuple(range(1, len(losses) + 1))
    layout = Layout(None, MAX_TOKENS, 24, tuple(losses), weights, chat=True)
    sources = Sources([Targets(root) for root in roots])
    options: dict[str, Any] = {"step_tokens": 1000, "micro_tokens": micro_tokens, "seed": 0, "packing": packing}
    with Loader(sources, layout, **options) as loader:
        return loader.step()


def gradients(student: Student, batch: StepBatch, losses: Sequence[Loss]) -> tuple[Figures, list[Tensor]]:
    student.model.zero_grad(set_to_none=True)
    objective = Objective(student, losses)
    figures = run_step(objective, batch, count_step(batch, Ranks()), Mixing("fixed", KD, CE), Ranks())
    return figures, [p.grad.clone() for p in student.model.parameters()]


@dataclass
class Row:
    """A stored sample, and what the student gives to its tokens.

    Attributes:
        columns: as stored.
        p: one distribution per token, by which it is predicted; of the first, which is not, zeros.
    """

    columns: dict[str, Any]
    p: Tensor

    @property
    def kept(self) -> int:
        return min(MAX_TOKENS, len(self.columns["student_ids"]))

    @property
    def labels(self) -> list[int]:
        return list(self.columns["student_ids"].tolist())

    def taught(self, token: int) -> bool:
        return 0 < token < self.kept and bool(self.columns["learn"][token])

    def chunks(self) -> list[tuple[int, int, int]]:
        """Number, first token and stop of those with a row."""
        ends = self.columns["chunk_student_end"].tolist()
        known = np.isfinite(self.columns["teacher_logprob"])
        return [(c, low, high) for c, (low, high) in enumerate(zip([0, *ends], ends, strict=False)) if known[c]]

    def entries(self, stem: str, at: int, what: str = "ids") -> dict[int, float]:
        """Probability by id (or by rank) of the chunk or token."""
        counts = self.columns[f"{stem}_count"]
        span = slice(int(counts[:at].sum()), int(counts[: at + 1].sum()))
        ids = self.columns[f"{stem}_ids"][span].tolist() if what == "ids" else range(int(counts[at]))
        return dict(zip(ids, np.exp(self.columns[f"{stem}_logprob"][span].astype(np.float64)), strict=True))

    def tail(self, stem: str, at: int) -> float:
        return math.exp(self.columns[f"{stem}_rest_logprob"][at])


def rows_of(root: str, student: Student, names: Sequence[str]) -> Iterator[Row]:
    """Each sample alone through the model, nothing put before it."""
    targets = Targets(root)
    for ref in targets.groups:
        group = targets.read(ref, ("student_ids", "learn", "chunk_student_end", "teacher_logprob", *names))
        for row in range(ref.rows):
            columns = {name: group.values(name, row) for name in group.lists}
            ids = torch.from_numpy(columns["student_ids"][:MAX_TOKENS].astype(np.int64))
            logits = student.model(input_ids=ids[None], use_cache=False).logits[0, :-1, :24]
            p = torch.softmax(logits, dim=-1)
            yield Row(columns, torch.cat([torch.zeros_like(p[:1]), p]))


def chunk_terms(name: str, options: dict[str, Any], row: Row, pair: Any) -> list[Tensor]:
    """The loss of each chunk that has a target and lies within what is kept."""
    W = torch.from_numpy(pair.weight_VU)
    arrays, terms = pair.arrays, []
    common, exact = sorted(arrays.student_id[arrays.common]), sorted(arrays.student_id[arrays.exact])
    for c, low, high in row.chunks():
        if high > row.kept:
            continue
        p, labels = row.p[low:high], row.labels[low:high]
        factor = 1.0
        if "factor_logprob" in row.columns:
            factor = math.exp(row.columns["factor_logprob"][c])
        if name == "p-kl":
            drop = options.get("rest") == "drop"
            terms.append(reference.p_kl(p[0], W, row.entries("pkl", c), row.tail("pkl", c), drop=drop))
        elif name == "sparse-kl":
            terms.append(reference.sparse_kl(p[0], row.entries("skl", c), row.tail("skl", c)))
        elif name == "strict":
            terms.append(reference.strict(p[0], row.entries("strict", c)))
        elif name == "mined":
            terms.append(reference.mined(p, labels, W, row.entries("mined", c), row.tail("mined", c)))
        elif name == "h-kl":
            other = list(row.entries("hkl_other", c, "ranks").values())
            terms.append(reference.h_kl(p[0], common, row.entries("hkl_common", c), other, 1.0, 8192))
        elif name == "gold":
            other = [factor * one for one in row.entries("gold_other", c, "ranks").values()]
            kept = {s: factor * one for s, one in row.entries("gold", c).items()}
            terms.append(reference.gold(reference.chain_rule(p, labels, "first"), kept, other, exact, 0.5, 30))
        elif name == "uld":
            theirs = [factor * one for one in row.entries("uld", c, "ranks").values()]
            terms.append(reference.sorted_l1(reference.chain_rule(p, labels, "first"), theirs))
    return terms


def alm_terms(options: dict[str, Any], row: Row, pair: Any) -> list[Tensor]:
    """ALM of chunks, joined as asked: a group goes on while the next chunk begins where it ends and has a row."""
    debias, groups = options.get("debias", ()), list[list[tuple[int, int, int]]]()
    numbers = {c for c, _, _ in row.chunks()}
    space = row.columns.get("alm_space_logprob")
    for c, low, high in row.chunks():
        begins = not groups or (c - 1) not in numbers or "merge" not in debias
        if not begins:
            begins = space[c - 1] > math.log(THRESHOLD)
        groups += [[]] if begins else []
        groups[-1].append((c, low, high))
    spaces, terms = np.flatnonzero(pair.vocab.space_V), []
    for group in groups:
        low, high, last = group[0][1], group[-1][2], group[-1][0]
        if high > row.kept:
            continue
        theirs = sum(float(row.columns["teacher_logprob"][c]) for c, _, _ in group)
        ours = sum(row.p[at, row.labels[at]].log() for at in range(low, high))
        if "outcome" in debias and row.taught(high) and not math.isnan(space[last]):
            theirs, ours = theirs + float(space[last]), ours + row.p[high, spaces].sum().log()
        terms.append(reference.alm(theirs, ours, "binary-kl", 100.0))
    return terms


def prefix_terms(row: Row, pair: Any) -> tuple[list[Tensor], int]:
    """Byte-prefix of each taught token, and the number of chunks."""
    order = pair.vocab.order
    terms, chunks, inside = [], 0, set[int]()
    for _, low, high in row.chunks():
        if high <= row.kept and row.columns["prefix_count"][low]:
            chunks += 1
            inside |= set(range(low, high))
    groups = row.columns["child_count"]
    for token in filter(row.taught, range(row.kept)):
        if token in inside and row.columns["prefix_count"][token]:
            q, tail = row.entries("prefix", token), row.tail("prefix", token)
            terms.append(reference.byte_prefix_kl(row.p[token], q, tail))
        for g in range(int(groups[:token].sum()), int(groups[: token + 1].sum())):
            within = order[row.columns["child_low"][g] : row.columns["child_high"][g]]
            terms.append(-math.exp(row.columns["child_logprob"][g]) * row.p[token, within].sum().log())
    return terms, chunks


def terms_of(name: str, options: dict[str, Any], row: Row, pair: Any) -> tuple[list[Tensor], int]:
    """Terms of a sample, and what it adds to their denominator."""
    if name == "byte-prefix":
        return prefix_terms(row, pair)
    terms = alm_terms(options, row, pair) if name == "alm" else chunk_terms(name, options, row, pair)
    return terms, len(terms)


def by_definition(
    student: Student, teachers: Sequence[tuple[str, str, dict[str, Any]]], pair: Any
) -> tuple[list[float], float, list[Tensor]]:
    """Each teacher's mean KD, CE, and the gradient of KD * sum of weighted means + CE * mean of CE.

    Args:
        teachers: root, loss and options; their weights are 1, 2, ... of those that hold a sample.
    """
    columns = [open_loss(name, pair.setup(**options)).columns.names for _, name, options in teachers]
    read = [list(rows_of(root, student, names)) for (root, _, _), names in zip(teachers, columns, strict=True)]
    held: dict[str, list[int]] = {}
    for t, rows in enumerate(read):
        for row in rows:
            held.setdefault(row.columns["student_ids"].tobytes(), []).append(t)
    plain, means = [0.0] * len(teachers), []
    for t, (_, name, options) in enumerate(teachers):
        found, total = list[tuple[float, Tensor]](), 0
        for row in read[t]:
            terms, count = terms_of(name, options, row, pair)
            of = held[row.columns["student_ids"].tobytes()]
            weight = (t + 1) / sum(one + 1 for one in of)
            found, total = found + [(weight, term) for term in terms], total + count
        plain[t] = sum(float(term.detach()) for _, term in found) / total
        means.append(sum(weight * term for weight, term in found) / total)
    owned = {row.columns["student_ids"].tobytes(): row for rows in reversed(read) for row in rows}.values()
    ce = [
        reference.cross_entropy(row.p[token], row.labels[token])
        for row in owned
        for token in range(row.kept)
        if row.taught(token)
    ]
    mean_ce = torch.stack(ce).mean()
    student.model.zero_grad(set_to_none=True)
    (KD * sum(means) + CE * mean_ce).backward()
    return plain, float(mean_ce.detach()), [p.grad.clone() for p in student.model.parameters()]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_its_definition(
    make_targets: Callable[..., str],
    student_dir: str,
    chat_info: ChatInfo,
    pair: Any,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    packing: bool,
) -> None:
    name, options = CASES[case]
    root = make_targets(LENGTHS, losses=(name,), step=STEP, chat=chat_info)
    student, loss = student_of(student_dir), open_loss(name, pair.setup(**options))
    (kd,), ce, expected = by_definition(student, [(root, name, options)], pair)
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 5)
    batch = batch_of([root], [loss], packing=packing)
    assert len(batch.micros) > 1
    figures, grads = gradients(student, batch, [loss])
    assert figures.kd == pytest.approx(kd, rel=1e-6)
    assert figures.ce == pytest.approx(ce, rel=1e-9)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_ce_alone(make_targets: Callable[..., str], student_dir: str, chat_info: ChatInfo, pair: Any) -> None:
    root = make_targets(LENGTHS, losses=("p-kl",), step=STEP, chat=chat_info)
    student = student_of(student_dir)
    _, ce, _ = by_definition(student, [(root, "p-kl", {})], pair)
    figures, _ = gradients(student, batch_of([root], [open_loss("ce", pair.setup())]), [open_loss("ce", pair.setup())])
    assert (figures.kd, figures.ce) == (None, pytest.approx(ce, rel=1e-9))


def test_several_teachers(make_targets: Callable[..., str], student_dir: str, chat_info: ChatInfo, pair: Any) -> None:
    """The second lacks two samples; losses per chunk, of features, and per token."""
    cases = [("p-kl", {}), CASES["alm joined"], ("byte-prefix", {})]
    roots = [
        make_targets(LENGTHS[: 1 + (i != 1)], losses=(name,), step=STEP, chat=chat_info, name=f"targets{i}")
        for i, (name, _) in enumerate(cases)
    ]
    student, losses = student_of(student_dir), [open_loss(name, pair.setup(**options)) for name, options in cases]
    teachers = [(root, name, options) for root, (name, options) in zip(roots, cases, strict=True)]
    plain, ce, expected = by_definition(student, teachers, pair)
    batch = batch_of(roots, losses, packing=True)
    assert batch.held == (6, 4, 6)
    figures, grads = gradients(student, batch, losses)
    assert figures.teachers == pytest.approx(plain, rel=1e-6)
    assert figures.ce == pytest.approx(ce, rel=1e-9)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_ranks_do_not_matter(
    make_targets: Callable[..., str], student_dir: str, chat_info: ChatInfo, pair: Any
) -> None:
    root, student = make_targets(LENGTHS, losses=("p-kl",), step=STEP, chat=chat_info), student_of(student_dir)
    losses = [open_loss("p-kl", pair.setup())]
    batch = batch_of([root], losses, 40)
    figures, grads = gradients(student, batch, losses)
    counts, parts = count_step(batch, Ranks()), []
    for rank in range(2):
        student.model.zero_grad(set_to_none=True)
        part = replace(batch, micros=batch.micros[rank::2])
        run_step(Objective(student, losses), part, counts, Mixing("fixed", KD, CE), Ranks())
        parts.append([p.grad.clone() for p in student.model.parameters()])
    assert figures.kd
    for one, *others in zip(grads, *parts, strict=True):
        torch.testing.assert_close(sum(others), one, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("packing", [False, True])
def test_samples_scored_alone_see_all_their_inputs(
    make_targets: Callable[..., str], student_dir: str, chat_info: ChatInfo, pair: Any, packing: bool
) -> None:
    """What names the samples at fault of a bad step: their sums are those of the micro-batch."""
    root, student = make_targets(LENGTHS, losses=("p-kl",), step=STEP, chat=chat_info), student_of(student_dir)
    loss = open_loss("p-kl", pair.setup())
    for micro in batch_of([root], [loss], packing=packing).micros:
        with torch.no_grad():
            whole = score(Objective(student, [loss]), micro, (0.0, 0.0))[1]
            alone = [score(Objective(student, [loss]), one, (0.0, 0.0))[1] for one in single_samples(micro)]
        assert len(alone) == len(micro.sample_ids)
        torch.testing.assert_close(sum(alone), whole, rtol=1e-9, atol=1e-9)


def test_the_head_is_made_for_taught_positions_only(
    make_targets: Callable[..., str], student_dir: str, chat_info: ChatInfo, pair: Any
) -> None:
    root, student = make_targets(LENGTHS, losses=("p-kl",), step=STEP, chat=chat_info), student_of(student_dir)
    batch = batch_of([root], [open_loss("p-kl", pair.setup())], 1000)
    (micro,) = batch.micros
    assert student.states(micro).shape[0] == batch.predicted < 0.8 * batch.inputs
