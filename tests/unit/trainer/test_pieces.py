"""Micro-batches cut into blocks before their pass: what is packed comes back, and is what a pass would make itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import xtoken.trainer.blocks as blocks_module
import xtoken.trainer.step as step_module
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.data.batches import Loader, StepBatch
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss, owners
from xtoken.trainer.losses.pkl import w_by_column
from xtoken.trainer.losses.sparse_kl import SparseKL
from xtoken.trainer.mixing import Mixing
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.packed import Packed, mapped
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.score import Sums, score
from xtoken.trainer.step import count_step, run_step
from xtoken.trainer.student.model import load_student

CPU = torch.device("cpu")


class Pair(NamedTuple):
    first: Tensor
    size: int


@dataclass(frozen=True)
class Record:
    columns: dict[str, Tensor]
    pair: Pair | None
    rows: tuple[Tensor, ...] = ()


def test_a_structure_comes_back() -> None:
    columns = {"int": torch.tensor([3, -1], dtype=torch.int32), "bool": torch.tensor([True, False])}
    columns |= {"float": torch.tensor([0.1, -torch.inf]), "double": torch.tensor([0.1], dtype=torch.float64)}
    record = Record(columns, Pair(torch.arange(4).view(2, 2), 7), (torch.empty(0, 5), torch.tensor([5])))
    packed = Packed((record, None, Record({}, None)), CPU)
    assert {dtype: (len(one), one.dtype) for dtype, one in packed.buffers.items()} == {
        torch.int64: (7, torch.int32),
        torch.bool: (2, torch.bool),
        torch.float32: (2, torch.float32),
        torch.float64: (1, torch.float64),
    }
    found, nothing, empty = packed.on(CPU)
    assert nothing is None
    assert empty == Record({}, None)
    assert found.pair.size == 7
    for name, column in columns.items():
        wanted = column.long() if name == "int" else column
        assert found.columns[name].dtype == wanted.dtype
        assert torch.equal(found.columns[name], wanted)
    assert torch.equal(found.pair.first, record.pair.first)  # type: ignore[union-attr]
    assert [part.shape for part in found.rows] == [(0, 5), (1,)]


def test_places_beyond_int32_are_kept() -> None:
    """A block of more than 2^31 logits: one chunk that long makes it so."""
    places = torch.tensor([5, 1 << 31, (1 << 40) + 1])
    (found,) = Packed((places,), CPU).on(CPU)
    assert torch.equal(found, places)


def step_of(root: str, loss: Loss) -> StepBatch:
    sources, layout = Sources([Targets(root)]), Layout(0, 32, 24, (loss,))
    with Loader(sources, layout, step_tokens=200, micro_tokens=20, seed=0) as loader:
        return loader.step()


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_cuts_as_a_pass_would(
    make_targets: Callable[..., str], student_dir: str, pair: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One micro-batch in advance and in another thread, with the same bits of sums and gradients."""
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 8)
    monkeypatch.setattr(step_module, "cuts_ahead", lambda _: True)
    loss = open_loss(name, pair.setup())
    batch = step_of(make_targets([[9, 12, 5], [6, 8]], losses=(name,)), loss)
    assert len(batch.micros) > 2
    student = Student(load_student(student_dir, CPU, False), CPU, None, 24)
    objective, counts, found = Objective(student, [loss]), count_step(batch, Ranks()), []
    distils = name != "ce"
    figures = run_step(objective, batch, counts, Mixing("fixed", 0.7, 0.3), Ranks(), agree=True)
    found = [one.grad.clone() for one in student.model.parameters()]
    student.model.zero_grad(set_to_none=True)
    weights = (0.3, 0.7) if distils else (1.0, 0.0)
    factors = [weight / total for weight, total in zip(weights, counts.total_T, strict=True)]
    sums = torch.zeros(Sums.size(1), dtype=torch.float64)
    for micro in batch.micros:
        assert micro.pieces is None
        value, part = score(objective, micro, factors, agree=True)
        value.backward()
        sums += part
    assert figures.ce == Sums.of(sums.tolist(), 1).ce / counts.predicted
    assert all(torch.equal(one, other.grad) for one, other in zip(found, student.model.parameters(), strict=True))


@pytest.mark.parametrize("ahead", [True, False])
def test_a_target_that_cannot_be_served_stops_the_step(
    make_targets: Callable[..., str], student_dir: str, pair: Any, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(step_module, "cuts_ahead", lambda _: ahead)
    loss = open_loss("sparse-kl", pair.setup())
    batch = step_of(make_targets([[9, 12, 5]], losses=("sparse-kl",)), loss)
    assert isinstance(loss, SparseKL)
    loss.size = 5  # a student with fewer tokens
    objective = Objective(Student(load_student(student_dir, CPU, False), CPU, None, 24), [loss])
    with pytest.raises(VerificationError, match="in skl_ids is none of the student's 5"):
        run_step(objective, batch, count_step(batch, Ranks()), Mixing("fixed", 1, 0), Ranks())


@pytest.mark.parametrize("length", [None, 2])
def test_paths_through_w_are_those_that_indexing_finds(pair: Any, length: int | None) -> None:
    """One loop against plain arrays: entries in order, and places as ``torch.unique`` tells them apart."""
    w, random = w_by_column(pair.setup()), np.random.default_rng(0)
    count_C = torch.tensor([3, 1, 9, 4])
    id_K = torch.tensor(np.concatenate([random.choice(pair.reached, size, replace=False) for size in count_C.tolist()]))
    first_C, drop = torch.tensor([0, 2, 3, 8]), length is not None
    length_C = None if length is None else torch.full_like(count_C, length)
    at = w.walk(count_C, id_K, 24, first_C, length_C, drop)
    rows = [
        (kept, n, (int(first_C[chunk]) + further) * 24 + int(w.student_N[n]))
        for kept, (chunk, token) in enumerate(zip(owners(count_C).tolist(), id_K.tolist(), strict=True))
        for further in range(length or 1)
        for n in np.flatnonzero(pair.arrays.teacher_id == token).tolist()
    ]
    assert len(rows) > 20
    for found, wanted in zip((at.kept_E, at.w_E, at.place_E), zip(*rows, strict=True), strict=True):
        assert found.tolist() == list(wanted)
    if drop:
        assert len(at.place_M) == len(at.cell_E) == 0
        return
    assert at.place_M.sort().values.tolist() == sorted(set(at.place_E.tolist()))
    assert len(at.place_M) < len(at.place_E), "no student token was reached twice"
    assert torch.equal(at.place_M[at.cell_E], at.place_E)


def test_no_entries_have_no_paths(pair: Any) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    at = w_by_column(pair.setup(learn_w=True)).walk(none, none, 24, none, None, False)
    assert all(len(part) == 0 for part in at[:-1])
    assert at.rows.total == 0


def test_all_of_a_kind_is_mapped() -> None:
    tree = ({"one": np.int64(1), "two": (2, "three")}, Pair(torch.ones(2), 4))
    doubled = mapped(tree, int, lambda value: 2 * value)
    assert doubled[0] == {"one": 1, "two": (4, "three")}
    assert doubled[1].size == 8
