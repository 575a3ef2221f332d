"""A step's objective: independent of micro-batches, blocks, ranks and padding, and equal to its definition."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import xtoken.trainer.blocks as blocks_module
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.blocks import spans, view
from xtoken.trainer.data.batches import Loader, StepBatch
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.diagnosis import single_samples
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.mixing import Mixing
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.score import score
from xtoken.trainer.step import Figures, count_step, run_step
from xtoken.trainer.student.model import load_student

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10]]
FIXED = Mixing("fixed", 0.7, 0.3)
DYNAMIC = Mixing("dynamic", 1.0, 0.1)
ROUNDING = 1e-5  # float32 gradients summed in another order
ALL = tuple(LOSSES)
OPTIONS = {"alm": {"debias": ["outcome", "merge"], "alm_threshold": 0.3}}


def student_of(folder: str) -> Student:
    return Student(load_student(folder, torch.device("cpu"), False).double(), torch.device("cpu"), None, 24)


def loss_of(pair: Any, name: str) -> Loss:
    return open_loss(name, pair.setup(**OPTIONS.get(name, {})))


def batch_of(roots: Sequence[str], losses: Sequence[Loss], micro_tokens: int, **options: Any) -> StepBatch:
    layout = Layout(0, 32, 24, tuple(losses), **({"weights": (1.0,) * len(losses)} | options))
    sources = Sources([Targets(root) for root in roots])
    with Loader(sources, layout, step_tokens=200, micro_tokens=micro_tokens, seed=0) as loader:
        return loader.step()


def step_of(
    student: Student, batch: StepBatch, losses: Sequence[Loss], mixing: Mixing, whole: StepBatch | None = None
) -> Figures:
    counts = count_step(whole or batch, Ranks())
    return run_step(Objective(student, losses), batch, counts, mixing, Ranks())


def gradients(
    student: Student, batch: StepBatch, losses: Sequence[Loss], mixing: Mixing
) -> tuple[Figures, list[torch.Tensor]]:
    student.model.zero_grad(set_to_none=True)
    figures = step_of(student, batch, losses, mixing)
    return figures, [p.grad.clone() for p in student.model.parameters()]


@pytest.mark.parametrize("mixing", [FIXED, DYNAMIC], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", ALL)
def test_micro_batches_and_blocks_do_not_matter(
    make_targets: Callable[..., str],
    student_dir: str,
    pair: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mixing: Mixing,
) -> None:
    root, student, losses = make_targets(LENGTHS, losses=(name,)), student_of(student_dir), [loss_of(pair, name)]
    whole = batch_of([root], losses, 1000)
    split = batch_of([root], losses, 13)
    assert len(whole.micros) == 1
    assert len(split.micros) > 4
    figures, grads = gradients(student, whole, losses, mixing)
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 3)
    figures_split, grads_split = gradients(student, split, losses, mixing)
    assert figures_split.loss == pytest.approx(figures.loss, rel=ROUNDING)
    assert (figures.kd is None) == (name == "ce")
    assert name == "ce" or figures.kd != 0
    for one, other in zip(grads, grads_split, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_ranks_do_not_matter(make_targets: Callable[..., str], student_dir: str, pair: Any, name: str) -> None:
    """Each rank takes some micro-batches and the whole step's denominators: the sum of gradients is the step's."""
    root, student, losses = make_targets(LENGTHS, losses=(name,)), student_of(student_dir), [loss_of(pair, name)]
    batch = batch_of([root], losses, 13)
    figures, grads = gradients(student, batch, losses, FIXED)
    ranks = [replace(batch, micros=batch.micros[rank::3]) for rank in range(3)]
    parts = [gradients(student, rank, losses, FIXED) for rank in ranks]
    assert sum(part.loss for part, _ in parts) == pytest.approx(figures.loss, rel=1e-9)
    for one, *others in zip(grads, *(part for _, part in parts), strict=True):
        torch.testing.assert_close(sum(others), one, rtol=ROUNDING, atol=1e-10)


def logits_of(student: Student, batch: StepBatch) -> torch.Tensor:
    (micro,) = batch.micros
    ids, positions = torch.from_numpy(micro.input_BL), torch.from_numpy(micro.position_BL)
    logits = student.model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits.reshape(-1, 32)[torch.from_numpy(micro.place_P)][:, :24]


@pytest.mark.parametrize("name", [name for name in ALL if name != "ce"])
def test_gradient_is_that_of_the_definition(
    make_targets: Callable[..., str], student_dir: str, pair: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """kd_weight * KD / chunks + ce_weight * CE / tokens, by autograd through everything at once."""
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 5)
    root, student, loss = make_targets(LENGTHS, losses=(name,)), student_of(student_dir), loss_of(pair, name)
    batch = batch_of([root], [loss], 1000)
    figures, grads = gradients(student, batch, [loss], FIXED)
    (micro,) = batch.micros
    student.model.zero_grad(set_to_none=True)
    logp = logits_of(student, batch).log_softmax(-1)
    seen = view(logp, micro, micro.targets[0], loss, (0, len(micro.label_P)))
    kd = loss.terms(seen).sum() / len(seen.first_C)
    ce = -logp[torch.arange(len(micro.label_P)), torch.from_numpy(micro.label_P)].mean()
    (0.7 * kd + 0.3 * ce).backward()
    assert figures.kd == pytest.approx(float(kd.detach()), rel=1e-9)
    assert figures.teachers == pytest.approx((float(kd.detach()),), rel=1e-9)
    assert figures.ce == pytest.approx(float(ce.detach()), rel=1e-9)
    for one, parameter in zip(grads, student.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", ["p-kl", "h-kl", "gold", "uld", "byte-prefix", "sparse-kl", "strict", "mined"])
def test_temperature_scales_logits_and_terms(
    make_targets: Callable[..., str], student_dir: str, pair: Any, name: str
) -> None:
    """tau^2 times the loss of softmax(logits / tau); CE stays at 1."""
    root, student = make_targets(LENGTHS, losses=(name,)), student_of(student_dir)
    setup = pair.setup()
    hot, cold = open_loss(name, replace(setup, tau=2.0)), open_loss(name, setup)
    batch = batch_of([root], [hot], 1000)
    figures, _ = gradients(student, batch, [hot], FIXED)
    (micro,) = batch.micros
    with torch.no_grad():
        logits = logits_of(student, batch)
        seen = view((logits / 2).log_softmax(-1), micro, micro.targets[0], cold, (0, len(micro.label_P)))
        kd = 4 * cold.terms(seen).sum() / len(seen.first_C)
        ce = torch.nn.functional.cross_entropy(logits, torch.from_numpy(micro.label_P))
    assert figures.kd == pytest.approx(float(kd), rel=1e-9)
    assert figures.ce == pytest.approx(float(ce), rel=1e-9)


@pytest.mark.parametrize("weighting", ["static", "entropy"])
def test_several_teachers_add_up(
    make_targets: Callable[..., str], student_dir: str, pair: Any, monkeypatch: pytest.MonkeyPatch, weighting: str
) -> None:
    """Three teachers, three losses of all kinds (chunk, features, token), one of them without half of the samples."""
    names = ("p-kl", "alm", "byte-prefix")
    roots = [make_targets(LENGTHS[: 1 + (i != 1)], losses=(name,), name=name) for i, name in enumerate(names)]
    student, losses = student_of(student_dir), [loss_of(pair, name) for name in names]
    batch = batch_of(roots, losses, 1000, weights=(1.0, 2.0, 3.0), weighting=weighting)
    assert batch.held == (8, 5, 8)
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 4)
    figures, grads = gradients(student, batch, losses, FIXED)
    (micro,) = batch.micros
    student.model.zero_grad(set_to_none=True)
    logp = logits_of(student, batch).log_softmax(-1)
    total, kd = -0.3 * logp[torch.arange(len(micro.label_P)), torch.from_numpy(micro.label_P)].mean(), 0.0
    for targets, loss, chunks, plain in zip(micro.targets, losses, batch.chunks, figures.teachers, strict=True):
        terms = loss.terms(view(logp, micro, targets, loss, (0, len(micro.label_P))))
        owner = micro.sample_P if loss.per == "token" else targets.sample_C
        mean = (terms * torch.from_numpy(targets.weight_B[owner])).sum() / chunks
        total, kd = total + 0.7 * mean, kd + float(mean.detach())
        assert plain == pytest.approx(float(terms.detach().sum()) / chunks, rel=1e-9)
    total.backward()
    assert figures.kd == pytest.approx(kd, rel=1e-9)
    assert figures.loss == pytest.approx(float(total.detach()), rel=1e-9)
    for one, parameter in zip(grads, student.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-6, atol=1e-10)


def test_learned_w_gets_the_gradient_of_the_definition(
    make_targets: Callable[..., str], student_dir: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, student = make_targets(LENGTHS, losses=("p-kl",)), student_of(student_dir)
    loss = open_loss("p-kl", pair.setup(learn_w=True))
    (theta,) = loss.parameters()
    batch = batch_of([root], [loss], 1000)
    (micro,) = batch.micros
    seen = view(
        logits_of(student, batch).detach().log_softmax(-1), micro, micro.targets[0], loss, (0, len(micro.label_P))
    )
    (expected,) = torch.autograd.grad(loss.terms(seen).sum() / len(seen.first_C) * 0.7, theta)
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 3)
    step_of(student, batch_of([root], [loss], 13), [loss], FIXED)
    assert float(expected.abs().sum()) > 0
    torch.testing.assert_close(theta.grad, expected, rtol=1e-4, atol=1e-7)


def test_blocks_do_not_tear_chunks(
    make_targets: Callable[..., str], pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_of(pair, "p-kl")
    (micro,) = batch_of([make_targets(LENGTHS)], [loss], 1000).micros
    (targets,) = micro.targets
    for size in range(1, 9):
        monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * size)
        found = list(spans(micro, 24, [loss], torch.device("cpu")))
        assert [low for low, _ in found] == [0, *(high for _, high in found[:-1])]
        assert found[-1][1] == len(micro.label_P)
        for first, length in zip(targets.first_C, targets.length_C, strict=True):
            assert any(low <= first and first + length <= high for low, high in found)
        assert all(high - low <= max(size, 2) for low, high in found), "no chunk here is longer than 2"


def test_dynamic_mixing_scales_kd_to_ce(make_targets: Callable[..., str], student_dir: str, pair: Any) -> None:
    root, student, loss = make_targets(LENGTHS), student_of(student_dir), [loss_of(pair, "p-kl")]
    batch = batch_of([root], loss, 20)
    figures, grads = gradients(student, batch, loss, DYNAMIC)
    assert figures.loss == pytest.approx(2 * figures.ce, rel=1e-9)
    assert figures.kd is not None
    _, fixed = gradients(student, batch, loss, Mixing("fixed", figures.ce / figures.kd, 1.0))
    for one, other in zip(grads, fixed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def test_dynamic_mixing_without_kd_is_ce(make_targets: Callable[..., str], student_dir: str, pair: Any) -> None:
    """Samples of one token have no chunk with a row: KD is 0, and nothing divides by it."""
    root, student, loss = make_targets([[1, 1]]), student_of(student_dir), [loss_of(pair, "p-kl")]
    batch = batch_of([root], loss, 20)
    assert batch.chunks == (0,)
    figures, grads = gradients(student, batch, loss, DYNAMIC)
    assert figures.loss == figures.ce
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_padded_head_columns_get_no_gradient_and_no_probability(
    make_targets: Callable[..., str], student_dir: str, pair: Any
) -> None:
    """Rows 24 to 31 of the head stand for no token."""
    loss = [loss_of(pair, "ce")]
    batch, student = batch_of([make_targets(LENGTHS)], loss, 50), student_of(student_dir)
    before, _ = gradients(student, batch, loss, FIXED)
    with torch.no_grad():
        student.model.get_output_embeddings().weight[24:] = 50.0
    after, _ = gradients(student, batch, loss, FIXED)
    assert after.ce == before.ce
    assert float(student.model.get_output_embeddings().weight.grad[24:].abs().sum()) == 0.0


@pytest.mark.parametrize("name", ALL)
def test_autocast_stays_near_float32(make_targets: Callable[..., str], student_dir: str, pair: Any, name: str) -> None:
    """bfloat16 has 8 bits of mantissa: a few per cent."""
    loss, device = [loss_of(pair, name)], torch.device("cpu")
    batch = batch_of([make_targets(LENGTHS, losses=(name,))], loss, 50)
    found = []
    for autocast in (None, torch.bfloat16):
        student = Student(load_student(student_dir, device, False), device, autocast, 24)
        figures, grads = gradients(student, batch, loss, FIXED)
        found.append((figures.loss, torch.cat([grad.flatten() for grad in grads])))
    (loss32, grad32), (loss16, grad16) = found
    assert loss16 == pytest.approx(loss32, rel=0.02)
    assert torch.cosine_similarity(grad32, grad16, dim=0) > 0.99


def packed_model(family: str) -> Any:
    """A tiny random model of another family; its attention tells packed samples apart in its own way."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    auto: Any = AutoModelForCausalLM
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 32,
        "pad_token_id": None,
        "logits_scaling": 8.0,
    }
    return auto.from_config(AutoConfig.for_model(family, bos_token_id=0, eos_token_id=1, sliding_window=4, **sizes))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", ALL)
def test_packing_changes_no_loss(
    make_targets: Callable[..., str], pair: Any, monkeypatch: pytest.MonkeyPatch, name: str, family: str
) -> None:
    """Several samples in a row, blocks that cut through them: figures and gradients are those of one sample per row."""
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 5)
    root, losses = make_targets(LENGTHS, losses=(name,)), [loss_of(pair, name)]
    student = Student(packed_model(family).double(), torch.device("cpu"), None, 24)
    layout = Layout(0, 32, 24, tuple(losses))
    found = []
    for packing in (False, True):
        with Loader(
            Sources([Targets(root)]), layout, step_tokens=200, micro_tokens=64, seed=0, packing=packing
        ) as loader:
            batch = loader.step()
        rows = [len(micro.input_BL) for micro in batch.micros]
        assert packing == (sum(rows) < len(batch.sample_ids))
        found.append(gradients(student, batch, losses, FIXED))
    (padded, grads), (packed, packed_grads) = found
    assert packed.loss == pytest.approx(padded.loss, rel=1e-9)
    assert packed.ce == pytest.approx(padded.ce, rel=1e-9)
    for one, other in zip(grads, packed_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)  # norms take float32


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_scale_and_cap_of_a_head_get_their_gradient(
    make_targets: Callable[..., str], pair: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """A fused head that bends its logits, against autograd through the model's own."""
    monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * 5)
    root, loss = make_targets(LENGTHS), loss_of(pair, "p-kl")
    student = Student(packed_model(family).double(), torch.device("cpu"), None, 24)
    assert student.head.fusable
    assert (student.head.scale, student.head.softcap) != (1.0, None)
    batch = batch_of([root], [loss], 1000)
    figures, grads = gradients(student, batch, [loss], FIXED)
    (micro,) = batch.micros
    student.model.zero_grad(set_to_none=True)
    logp = logits_of(student, batch).log_softmax(-1)
    seen = view(logp, micro, micro.targets[0], loss, (0, len(micro.label_P)))
    ce = -logp[torch.arange(len(micro.label_P)), torch.from_numpy(micro.label_P)].mean()
    (0.7 * loss.terms(seen).sum() / len(seen.first_C) + 0.3 * ce).backward()
    assert figures.ce == pytest.approx(float(ce.detach()), rel=1e-9)
    for one, parameter in zip(grads, student.model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-6, atol=1e-10)


def test_samples_of_a_step_are_scored_alone(make_targets: Callable[..., str], student_dir: str, pair: Any) -> None:
    """What a diagnosis says of each sample adds up to the step's figures, packed or not."""
    root, student, loss = make_targets(LENGTHS), student_of(student_dir), loss_of(pair, "p-kl")
    objective = Objective(student, [loss])
    with Loader(
        Sources([Targets(root)]), Layout(0, 32, 24, (loss,)), step_tokens=200, micro_tokens=64, seed=0, packing=True
    ) as loader:
        batch = loader.step()
    figures, _ = gradients(student, batch, [loss], FIXED)
    alone = [one for micro in batch.micros for one in single_samples(micro)]
    assert [one.sample_ids[0] for one in alone] == batch.sample_ids
    with torch.no_grad():
        sums = sum(score(objective, one, (0.0, 0.0))[1] for one in alone)
    assert isinstance(sums, torch.Tensor)
    assert float(sums[0]) / batch.predicted == pytest.approx(figures.ce, rel=1e-9)
    assert float(sums[2]) / batch.chunks[0] == pytest.approx(figures.kd, rel=1e-9)


@pytest.mark.parametrize("name", ["p-kl", "h-kl", "byte-prefix", "sparse-kl", "mined"])
def test_agreement_counts_equal_first_tokens(
    make_targets: Callable[..., str], student_dir: str, pair: Any, name: str
) -> None:
    """Against a search of each chunk's own entries for the largest."""
    root, student, loss = make_targets(LENGTHS, losses=(name,)), student_of(student_dir), loss_of(pair, name)
    batch = batch_of([root], [loss], 1000)
    (micro,) = batch.micros
    with torch.no_grad():
        logp = logits_of(student, batch).log_softmax(-1)
        sums = score(Objective(student, [loss]), micro, (0.0, 0.0), agree=True)[1]
    said = [_said(name, micro.targets[0].columns, chunk, int(first)) for chunk, first in _firsts(micro)]
    mine = [int(logp[int(first)].argmax()) for _, first in _firsts(micro)]
    if name in ("p-kl", "mined"):
        mine = [int(pair.weight_VU[token].argmax()) if pair.weight_VU[token].any() else -1 for token in mine]
    known = [(a, b) for a, b in zip(mine, said, strict=True) if b is not None]
    assert sums[3:5].tolist() == [sum(a == b for a, b in known), len(known)]


def _firsts(micro: Any) -> list[tuple[int, Any]]:
    return list(enumerate(micro.targets[0].first_C))


def _said(name: str, columns: Any, chunk: int, position: int) -> int | None:
    """The teacher's most probable token of a chunk, where the columns tell."""
    stem = {"p-kl": "pkl", "h-kl": "hkl_common", "byte-prefix": "prefix", "sparse-kl": "skl"}.get(name, name)
    at = position if name == "byte-prefix" else chunk
    count = columns[f"{stem}_count"].astype(int)
    entries = slice(count[:at].sum(), count[: at + 1].sum())
    ids, logprob = columns[f"{stem}_ids"][entries], columns[f"{stem}_logprob"][entries]
    if not len(ids):
        return None
    if name == "h-kl":
        others = columns["hkl_other_count"].astype(int)
        rest = columns["hkl_other_logprob"][others[:at].sum() : others[: at + 1].sum()]
        if len(rest) and rest.max() >= logprob.max():
            return None
    return int(ids[logprob.argmax()])
