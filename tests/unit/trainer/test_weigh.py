"""``--weigh``: chunks of one token on either side, and the others, at weights of their own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.trainer.test_step import FIXED, LENGTHS, ROUNDING, batch_of, gradients, logits_of, student_of
from xtoken.schemas.configs.train import LossGroup
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.blocks import view
from xtoken.trainer.data.batches import StepBatch
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.samples import read_samples
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import WEIGHT, Loss

PER_CHUNK = [name for name, schema in LOSSES.items() if "chunk" in {column.axis for column in schema.columns}]
KINDS = ["one-to-one=1", "other=0.25"]


def weighing(pair: Any, name: str, weigh: list[str], **options: Any) -> Loss:
    setup = pair.setup(**options)
    return open_loss(name, replace(setup, options=setup.options.changed(weigh=weigh)))


def one_to_one(root: str, batch: StepBatch) -> dict[str, list[bool]]:
    """Of each sample's chunks with a target of alm, read from the table."""
    targets = Targets(root)
    kinds: dict[str, list[bool]] = {}
    for ref in targets.groups:
        group = targets.read(ref, ("chunk_student_end", "chunk_teacher_end", "teacher_logprob"))
        for row, sample_id in enumerate(group.sample_ids):
            student, teacher = (
                np.diff(group.values(f"chunk_{side}_end", row), prepend=0) for side in ("student", "teacher")
            )
            known = np.isfinite(group.values("teacher_logprob", row))
            kinds[sample_id] = ((student == 1) & (teacher == 1))[known].tolist()
    return {sample_id: kinds[sample_id] for sample_id in batch.sample_ids}


@pytest.mark.parametrize("name", PER_CHUNK)
def test_the_loss_is_a_weighted_mean(make_targets: Callable[..., str], student_dir: str, pair: Any, name: str) -> None:
    root, student = make_targets(LENGTHS, losses=(name,)), student_of(student_dir)
    plain, loss = weighing(pair, name, []), weighing(pair, name, KINDS)
    (micro,) = batch_of([root], [plain], 1000).micros
    (weighed,) = batch_of([root], [loss], 1000).micros
    batch = batch_of([root], [loss], 13)
    weight_C = torch.from_numpy(weighed.targets[0].columns[WEIGHT])
    assert set(weight_C.tolist()) == {1.0, 0.25}
    logp = logits_of(student, replace(batch, micros=[micro])).log_softmax(-1)
    terms_C = plain.terms(view(logp, micro, micro.targets[0], plain, (0, len(micro.label_P))))
    expected = (terms_C * weight_C).sum() / weight_C.sum()
    figures, grads = gradients(student, batch, [loss], FIXED)
    assert figures.kd == pytest.approx(float(expected.detach()), rel=1e-9)
    student.model.zero_grad(set_to_none=True)
    ce = -logp.gather(1, torch.from_numpy(micro.label_P)[:, None]).mean()
    (0.7 * expected + 0.3 * ce).backward()
    for one, parameter in zip(grads, student.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=ROUNDING, atol=1e-9)


def test_kinds_are_those_of_the_table(make_targets: Callable[..., str], pair: Any) -> None:
    root, loss = make_targets(LENGTHS, losses=("alm",)), weighing(pair, "alm", KINDS)
    batch = batch_of([root], [loss], 1000)
    (micro,) = batch.micros
    targets, kinds = micro.targets[0], one_to_one(root, batch)
    for number, sample_id in enumerate(micro.sample_ids):
        weights = targets.columns[WEIGHT][targets.sample_C == number].tolist()
        assert weights == [1.0 if one else 0.25 for one in kinds[sample_id]]


@pytest.mark.parametrize("weigh", [["other=0"], ["one-to-one=0"]])
def test_a_kind_of_weight_0_is_left_out(make_targets: Callable[..., str], pair: Any, weigh: list[str]) -> None:
    root = make_targets(LENGTHS, losses=("p-kl",))
    every, kept = (batch_of([root], [weighing(pair, "p-kl", one)], 1000) for one in (KINDS, weigh))
    ones = int((every.micros[0].targets[0].columns[WEIGHT] == 1).sum())
    assert 0 < ones < every.chunks[0]
    assert kept.chunks == ((ones,) if weigh == ["other=0"] else (every.chunks[0] - ones,))
    ids, logprob = (kept.micros[0].targets[0].columns[f"pkl_{name}"] for name in ("ids", "logprob"))
    assert len(ids) == len(logprob) == kept.micros[0].targets[0].columns["pkl_count"].sum()


def test_ends_of_another_length_are_refused(make_targets: Callable[..., str], pair: Any) -> None:
    targets, loss = Targets(make_targets(LENGTHS, losses=("alm",))), weighing(pair, "alm", KINDS)
    layout = Layout(0, 32, 24, (loss,))
    group = targets.read(targets.groups[0], layout.columns(0))
    offsets, values = group.lists["chunk_teacher_end"]
    group.lists["chunk_teacher_end"] = (np.minimum(offsets, offsets[-1] - 1), values[:-1])
    with pytest.raises(VerificationError, match="contradicts itself"):
        read_samples([[(group, row)] for row in range(len(group.sample_ids))], layout)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"weigh": ["other=0", "one-to-one=0"]}, "all kinds of chunks weigh 0"),
        ({"weigh": ["two=1"]}, "'two=1': expected one-to-one=NUMBER and other=NUMBER"),
        ({"weigh": ["other=1", "other=2"]}, "each at most once"),
        ({"weigh": ["other"]}, "'other': expected a number behind '=', as in other=0.25"),
        ({"weigh": ["other=-1"]}, "'other=-1': the weight must be a finite number of at least 0"),
        ({"weigh": ["other=nan"]}, "'other=nan': the weight must be a finite number"),
        ({"weigh": ["other=0"], "loss": ["byte-prefix"]}, "the loss byte-prefix is one per token"),
        ({"weigh": ["other=0"], "loss": ["ce"]}, "the loss ce has no chunks"),
        ({"weigh": ["one-to-one=0"], "loss": ["strict"]}, "strict learns from one-to-one chunks alone"),
        ({"weigh": ["one-to-one=0"], "loss": ["alm", "strict"]}, "strict learns from one-to-one chunks alone"),
        ({"weigh": ["other=0"], "loss": ["alm"], "debias": ["merge"]}, "joins chunks of both kinds"),
    ],
)
def test_refusals(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        LossGroup(**options)


@pytest.mark.parametrize("name", ["kd_weight", "ce_weight"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_a_weight_of_a_term_is_a_number(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        LossGroup(**{name: value, "mix": "gradmag"})


def test_a_kind_that_is_not_named_weighs_1() -> None:
    assert LossGroup(weigh=["other=0.5"]).kinds == (1.0, 0.5)
    assert LossGroup(weigh=["other=0.5"]).weigh == ["one-to-one=1", "other=0.5"]
    assert LossGroup().kinds is None
