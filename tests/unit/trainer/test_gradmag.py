"""``--mix gradmag``: norms against autograd through everything at once, and the weights that follow from them."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import xtoken.trainer.blocks as blocks_module
from tests.unit.trainer.test_step import ALL, LENGTHS, ROUNDING, batch_of, gradients, loss_of, step_of, student_of
from xtoken.schemas.configs.train import LossGroup
from xtoken.trainer.blocks import view
from xtoken.trainer.data.batches import StepBatch
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.mixing import MOST, Mixing
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.step import Figures, count_step, run_step

DISTIL = [name for name in ALL if name != "ce"]


def gradmag(teachers: int = 1, kd: float = 1.0, ce: float = 1.0, every: int = 10) -> Mixing:
    return Mixing("gradmag", kd, ce, (1 / teachers,) * teachers, every)


def measured(student: Student, batch: StepBatch, losses: list[Loss], step: int, mixing: Mixing) -> Figures:
    counts = count_step(batch, Ranks())
    return run_step(Objective(student, losses), batch, counts, mixing, Ranks(), step=step)


def by_autograd(student: Student, batch: StepBatch, losses: list[Loss]) -> list[float]:
    """Norms of CE and of each teacher's term, by the hidden states of one micro-batch that holds the step."""
    (micro,) = batch.micros
    states_PH = student.states(micro).detach().requires_grad_()
    logits = torch.nn.functional.linear(states_PH, student.model.get_output_embeddings().weight)[
        :, : student.vocabulary
    ]
    logp = logits.log_softmax(-1)
    terms = [-logp.gather(1, torch.from_numpy(micro.label_P)[:, None]).mean()]
    for targets, loss in zip(micro.targets, losses, strict=True):
        scaled = (logits / loss.temperature).log_softmax(-1)
        seen = view(scaled, micro, targets, loss, (0, len(micro.label_P)))
        owner = targets.sample_C if loss.per == "chunk" else micro.sample_P
        weight = torch.from_numpy(targets.weight_B[owner])
        terms.append((loss.terms(seen) * weight).sum() / len(targets.first_C) * loss.temperature**2)
    return [float(torch.autograd.grad(term, states_PH, retain_graph=True)[0].norm()) for term in terms]


@pytest.mark.parametrize("name", DISTIL)
def test_norms_are_those_of_autograd(
    make_targets: Callable[..., str], student_dir: str, pair: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root, student, loss = make_targets(LENGTHS, losses=(name,)), student_of(student_dir), loss_of(pair, name)
    expected = by_autograd(student, batch_of([root], [loss], 1000), [loss])
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 5)
    figures = measured(student, batch_of([root], [loss], 13), [loss], 11, gradmag())
    assert figures.norms == pytest.approx(expected, rel=ROUNDING)
    assert min(expected) > 0


def test_norms_of_two_teachers_and_of_the_extra_pass(
    make_targets: Callable[..., str], student_dir: str, pair: Any
) -> None:
    """The pass before step 1 measures what a step would, and leaves no gradient behind."""
    roots = [make_targets(LENGTHS, losses=("p-kl", "alm"))] * 2
    student, losses = student_of(student_dir), [loss_of(pair, "p-kl"), loss_of(pair, "alm")]
    batch = batch_of(roots, losses, 1000, weights=(0.75, 0.25))
    expected = by_autograd(student, batch, losses)
    mixing = Mixing("gradmag", 1.0, 0.5, (0.75, 0.25))
    first = measured(student, batch, losses, 1, mixing)
    assert first.norms is None
    assert mixing.norms() == pytest.approx(expected, rel=ROUNDING)
    assert mixing.measured_T == [1, 1, 1]
    # equal gradients, times what the user asked for
    sizes = [weight * norm for weight, norm in zip(first.weights, expected, strict=True)]
    assert sizes == pytest.approx([0.5 * expected[0], 0.75 * expected[0], 0.25 * expected[0]], rel=ROUNDING)
    one = [p.grad.clone() for p in student.model.parameters()]
    student.model.zero_grad(set_to_none=True)
    measured(student, batch, losses, 2, mixing)
    for with_pass, without in zip(one, student.model.parameters(), strict=True):
        torch.testing.assert_close(with_pass, without.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", DISTIL)
def test_measuring_changes_no_gradient(
    make_targets: Callable[..., str], student_dir: str, pair: Any, name: str
) -> None:
    """A step that measures has the gradient of one of the same weights that does not, and of ``fixed`` with them."""
    root, student, losses = make_targets(LENGTHS, losses=(name,)), student_of(student_dir), [loss_of(pair, name)]
    batch, mixing = batch_of([root], losses, 13), gradmag()
    mixing.observe([2.0, 0.25])
    ce_weight, kd_weight = mixing.by_norms()
    assert (ce_weight, kd_weight) == (1.0, pytest.approx(8.0))
    figures, expected = gradients(student, batch, losses, Mixing("fixed", kd_weight, ce_weight))
    student.model.zero_grad(set_to_none=True)
    found = measured(student, batch, losses, 11, mixing)
    assert found.loss == pytest.approx(figures.loss, rel=1e-12)
    for one, parameter in zip(expected, student.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["p-kl", "alm", "byte-prefix"])
def test_ranks_add_up_to_the_norm_of_the_step(
    make_targets: Callable[..., str], student_dir: str, pair: Any, name: str
) -> None:
    root, student, losses = make_targets(LENGTHS, losses=(name,)), student_of(student_dir), [loss_of(pair, name)]
    batch, mixing = batch_of([root], losses, 13), gradmag()
    whole = measured(student, batch, losses, 11, mixing)
    counts = count_step(batch, Ranks())
    parts = [
        run_step(
            Objective(student, losses), replace(batch, micros=batch.micros[rank::3]), counts, mixing, Ranks(), step=11
        )
        for rank in range(3)
    ]
    for i in range(2):
        squares = sum(part.norms[i] ** 2 for part in parts if part.norms is not None)
        assert math.sqrt(squares) == pytest.approx(whole.norms[i], rel=1e-9)


def test_distillation_alone(make_targets: Callable[..., str], student_dir: str, pair: Any) -> None:
    """With ``--ce-weight 0`` CE is neither trained nor measured, and the one term left has the user's weight."""
    root, student, losses = make_targets(LENGTHS, losses=("alm",)), student_of(student_dir), [loss_of(pair, "alm")]
    batch, mixing = batch_of([root], losses, 1000), gradmag(kd=0.5, ce=0.0)
    first = measured(student, batch, losses, 1, mixing)
    assert first.weights == (0.0, pytest.approx(0.5))
    assert mixing.measured_T == [0, 1]
    assert measured(student, batch, losses, 11, mixing).norms[0] == 0
    student.model.zero_grad(set_to_none=True)
    _, expected = gradients(student, batch, losses, Mixing("fixed", 0.5, 0.0))
    student.model.zero_grad(set_to_none=True)
    measured(student, batch, losses, 2, mixing)
    for one, parameter in zip(expected, student.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_the_largest_of_several_teachers_leads_where_ce_has_no_weight() -> None:
    mixing = gradmag(teachers=2, ce=0.0)
    mixing.observe([5.0, 0.1, 0.4])
    assert mixing.norms() == [None, pytest.approx(0.1), pytest.approx(0.4)]
    assert mixing.by_norms() == [0.0, pytest.approx(0.5 * 4), pytest.approx(0.5)]


def test_norms_are_averaged_without_bias() -> None:
    """By hand: after 2 and 4 the decayed sum is .9 * .2 + .4 = .58, its weights sum to .19; 3.0526."""
    mixing = gradmag()
    mixing.observe([1.0, 2.0])
    assert mixing.norms() == pytest.approx([1.0, 2.0])
    mixing.observe([1.0, 4.0])
    assert mixing.norms() == pytest.approx([1.0, 0.58 / 0.19])


@pytest.mark.parametrize("missing", [0.0, math.nan, math.inf])
def test_a_term_without_a_gradient_keeps_its_norm(missing: float) -> None:
    mixing = gradmag()
    mixing.observe([3.0, missing])
    assert mixing.by_norms() == [1.0, 1.0], "never measured: the user's weight"
    mixing.observe([3.0, 1.5])
    mixing.observe([3.0, missing])
    assert mixing.by_norms() == [1.0, pytest.approx(2.0)]
    assert mixing.measured_T == [3, 1]


def test_weights_are_capped() -> None:
    mixing = gradmag(kd=0.5)
    mixing.observe([1.0, 1e-9])
    assert mixing.by_norms() == [1.0, 0.5 * MOST]
    assert mixing.capped() == [1]


def test_no_chunks_in_a_step(make_targets: Callable[..., str], student_dir: str, pair: Any) -> None:
    """A teacher that has no target in the step is not measured there, and the step is that of CE."""
    root, student, losses = make_targets(LENGTHS, losses=("p-kl",)), student_of(student_dir), [loss_of(pair, "p-kl")]
    batch = batch_of([root], losses, 1000)
    (micro,) = batch.micros
    targets = micro.targets[0]
    none = replace(targets.slice(0, 0), spec=targets.spec)
    empty = replace(
        targets,
        first_C=none.first_C,
        length_C=none.length_C,
        next_C=none.next_C,
        columns=none.columns,
        sample_C=targets.sample_C[:0],
    )
    batch = replace(batch, micros=[replace(micro, targets=(empty,))], chunks=(0,), totals=(0.0,))
    mixing = gradmag()
    figures = measured(student, batch, losses, 1, mixing)
    assert mixing.measured_T == [1, 0]
    assert figures.weights == (1.0, 1.0)
    assert figures.loss == pytest.approx(figures.ce)


def test_other_mixes_measure_nothing(make_targets: Callable[..., str], student_dir: str, pair: Any) -> None:
    root, student, losses = make_targets(LENGTHS, losses=("p-kl",)), student_of(student_dir), [loss_of(pair, "p-kl")]
    assert step_of(student, batch_of([root], losses, 1000), losses, Mixing("fixed", 1.0, 0.1)).norms is None


def test_weight_of_ce_follows_the_mix() -> None:
    assert LossGroup().ce_weight == 0.1
    assert LossGroup(mix="gradmag").ce_weight == 1.0
    assert LossGroup(mix="gradmag", ce_weight=0.1).ce_weight == 0.1
    for mix in ("fixed", "gradmag"):
        assert LossGroup(mix=mix, ce_weight=0).ce_weight == 0


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"mix": "dynamic", "ce_weight": 0}, "CE cannot weigh 0; use --mix fixed or gradmag"),
        ({"gradmag_every": 5}, "--gradmag-every goes with --mix gradmag, not fixed; leave it out"),
        ({"mix": "gradmag", "kd_weight": 0}, "say --loss ce for that"),
    ],
)
def test_weights_that_leave_nothing_are_refused(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        LossGroup(**options)
