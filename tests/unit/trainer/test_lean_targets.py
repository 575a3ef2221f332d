"""Targets of version 6 train as those of version 5 do, but for the rounding of log-probabilities to steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from xtoken.schemas.errors import VerificationError
from xtoken.schemas.losses import LOSSES, gap_columns
from xtoken.schemas.tables import target_columns
from xtoken.trainer.blocks import view
from xtoken.trainer.data.batches import Loader, StepBatch
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10]]
STEP = 1 / 32
FLOAT32 = 2e-6
ROUNDED = {name for gaps in gap_columns(LOSSES) for name in (gaps.logprob, gaps.tail)}
OF = [name for name in LOSSES if name != "ce"]
TURNED = ("p-kl", "h-kl", "sparse-kl", "strict")  # by --kl reverse
Make = Callable[..., str]


def read_all(root: str, names: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    targets = Targets(root)
    groups = [targets.read(ref, names) for ref in targets.groups]
    return {name: [array for group in groups for array in group.lists[name]] for name in names}


@pytest.mark.parametrize("name", OF)
def test_the_same_samples_are_read(make_targets: Make, name: str) -> None:
    columns = tuple(column for column, _ in target_columns([name])[1:])
    old = read_all(make_targets(LENGTHS, losses=(name,), name="old"), columns)
    new = read_all(make_targets(LENGTHS, losses=(name,), name="new", step=STEP), columns)
    for column in columns:
        for ours, theirs in zip(new[column], old[column], strict=True):
            assert ours.dtype == theirs.dtype
            atol = STEP + 1e-5 if column in ROUNDED else 0
            np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0, err_msg=column)


def batch_of(root: str, loss: Loss) -> StepBatch:
    with Loader(Sources([Targets(root)]), Layout(0, 32, 24, (loss,)), step_tokens=200, micro_tokens=1000, seed=0) as it:
        return it.step()


def loss_and_gradient(root: str, loss: Loss, logits_PV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms, and the gradient of their sum by the logits of every position."""
    (micro,) = batch_of(root, loss).micros
    logits = logits_PV[: len(micro.label_P)].clone().requires_grad_()
    seen = view(logits.log_softmax(-1), micro, micro.targets[0], loss, (0, len(micro.label_P)))
    terms = loss.terms(seen)
    terms.sum().backward()
    assert logits.grad is not None
    return terms.detach(), logits.grad


@pytest.mark.parametrize(("name", "kl"), [*((name, "forward") for name in OF), *((name, "reverse") for name in TURNED)])
def test_loss_and_gradient_differ_by_the_rounding_alone(make_targets: Make, pair: Any, name: str, kl: str) -> None:
    """Bounds, s being the step: a target is p before and p' after with |log p' - log p| <= s and |p' - p|_1 <= s / 2.

    Forward, KL(p || q) has the gradient m - p by the logits, m and p being spread over the tokens that share a cell by
    weights which sum to 1: it moves by at most s / 2 in all. The value is sum p log p - sum p log q and moves by at
    most s + s / 2 * max |log q| over the cells. Reverse, KL(q || p) moves by sum q (log p - log p') <= s, its gradient
    q (log q - log p - KL) by q times two such differences: 2 s in all. Child groups of byte-prefix are not rounded, and
    the other losses hold what they held.
    """
    torch.manual_seed(4)
    logits_PV = torch.randn(200, 24, dtype=torch.float64)
    loss = open_loss(name, pair.setup(kl=kl))
    old = loss_and_gradient(make_targets(LENGTHS, losses=(name,), name="old"), loss, logits_PV)
    new = loss_and_gradient(make_targets(LENGTHS, losses=(name,), name="new", step=STEP), loss, logits_PV)
    moved_P = (new[1] - old[1]).abs().sum(-1)
    changed = bool(LOSSES[name].gaps)
    assert bool((moved_P > 0).any()) == changed
    if not changed:
        assert torch.equal(new[0], old[0])
        return
    least = float(logits_PV.log_softmax(-1).min()) - 10  # a cell of a piece has a thousandth of its token and more
    value, gradient = (STEP, 2 * STEP) if kl == "reverse" else (STEP + STEP / 2 * -least, STEP / 2)
    assert float((new[0] - old[0]).abs().max()) <= value + FLOAT32
    assert float(moved_P.max()) <= gradient + FLOAT32
    assert float(moved_P.max()) < 0.2 * float(old[1].abs().sum(-1).max())


@pytest.mark.parametrize("name", ["p-kl", "byte-prefix", "strict", "h-kl"])
def test_finer_steps_come_nearer(make_targets: Make, pair: Any, name: str) -> None:
    torch.manual_seed(4)
    logits_PV = torch.randn(200, 24, dtype=torch.float64)
    loss = open_loss(name, pair.setup())
    old = loss_and_gradient(make_targets(LENGTHS, losses=(name,), name="old"), loss, logits_PV)[1]
    coarse, fine = (
        loss_and_gradient(make_targets(LENGTHS, losses=(name,), name=f"new{step}", step=step), loss, logits_PV)[1]
        for step in (STEP, 2.0**-10)
    )
    assert float((fine - old).abs().max()) <= float((coarse - old).abs().max()) / 8


def broken(root: str, name: str, change: Callable[[list[int]], list[int]]) -> Targets:
    path = Path(root) / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index(name)
    kind = table.schema.field(at)
    rows = [change(values) for values in table[name].to_pylist()]
    pq.write_table(table.set_column(at, kind, pa.array(rows, kind.type)), path, row_group_size=2)
    return Targets(root)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("pkl_codes", lambda codes: [*codes[:-1], 30], r"row group 0: pkl_codes has a code outside 0 to 29; 'xtoken"),
        ("pkl_codes", lambda codes: [*codes[:-1], -1], "pkl_codes has a code outside 0 to 29"),
        ("pkl_gap", lambda gaps: gaps[:-1], "pkl_count does not sum to the entries of pkl_gap"),
        ("pkl_rest_gap", lambda gaps: gaps[:-1], "pkl_count does not sum to the entries of pkl_gap"),
        ("pkl_count", lambda counts: [-1, *counts[1:]], "pkl_count does not sum to the entries of pkl_gap"),
    ],
)
def test_damage_is_named(make_targets: Make, name: str, change: Callable[[list[int]], list[int]], says: str) -> None:
    targets = broken(make_targets(LENGTHS, losses=("p-kl",), step=STEP), name, change)
    with pytest.raises(VerificationError, match=says):
        targets.read(targets.groups[0], ("pkl_ids", "pkl_logprob"))


def test_lists_of_two_samples_that_only_fit_together_are_refused(make_targets: Make, pair: Any) -> None:
    """As many entries in all, but the first sample has one of the second's."""
    root = make_targets(LENGTHS, losses=("p-kl",), step=STEP)
    path = Path(root) / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    for name in ("pkl_codes", "pkl_gap"):
        at = table.schema.get_field_index(name)
        first, second, *others = table[name].to_pylist()
        moved = pa.array([[*first, second[0]], second[1:], *others], table.schema.field(at).type)
        table = table.set_column(at, table.schema.field(at), moved)
    pq.write_table(table, path, row_group_size=2)
    with pytest.raises(VerificationError, match="contradicts itself"):
        batch_of(root, open_loss("p-kl", pair.setup()))


def test_codes_that_are_not_those_of_the_manifest_are_refused(make_targets: Make) -> None:
    root = make_targets(LENGTHS, losses=("p-kl",), step=STEP)
    path = Path(root) / "codes.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    targets = Targets(root)
    with pytest.raises(VerificationError, match=r"codes.parquet has sha256"):
        targets.read(targets.groups[0], ("pkl_ids",))
    path.unlink()
    with pytest.raises(VerificationError, match=r"codes.parquet does not exist"):
        targets.read(targets.groups[0], ("pkl_ids",))
