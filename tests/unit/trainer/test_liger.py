"""CE by Liger's kernel against our own blocks. The kernel needs a GPU: a stand-in with its arguments takes its place.

What is tested is what we give it and make of its answer; the stand-in is plain torch and adds up the head's gradient in
chunks, in the dtype that it is told.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from xtoken.schemas.configs.train import StudentGroup
from xtoken.schemas.errors import XtokenError
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.score import score
from xtoken.trainer.start import use_liger
from xtoken.trainer.student.head import Head

CPU, CHUNK = torch.device("cpu"), 4
FAMILIES = {
    "plain": ("llama", {}),
    "scaled": ("granite", {"logits_scaling": 6.0}),
    "scaled-too": ("cohere", {"logit_scale": 0.25}),
    "capped": ("gemma2", {"final_logit_softcapping": 3.0}),
    "biased": ("phi", {}),
}


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        sums = torch.zeros_like(weight, dtype=dtype or weight.dtype)
        total, grads, bias_sum = 0.0, [], None if bias is None else torch.zeros_like(bias)
        for low in range(0, len(states), CHUNK):
            with torch.enable_grad():
                inputs = [states[low : low + CHUNK], weight, *([] if bias is None else [bias])]
                leaves = [one.detach().requires_grad_() for one in inputs]
                logits = torch.nn.functional.linear(*leaves).float()
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                loss = torch.nn.functional.cross_entropy(logits, target[low : low + CHUNK], reduction="sum")
            found = torch.autograd.grad(loss, leaves)
            total, sums = total + loss.detach(), sums + found[1].to(sums.dtype)
            grads.append(found[0])
            bias_sum = None if bias_sum is None else bias_sum + found[2]
        ctx.save_for_backward(torch.cat(grads), sums.to(weight.dtype), *([] if bias_sum is None else [bias_sum]))
        return torch.as_tensor(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        states, weight, *bias = (one * grad.to(one.dtype) for one in ctx.saved_tensors)
        return states, weight, None, bias[0] if bias else None, None, None


def liger_fused_linear_cross_entropy(
    input: Tensor,  # noqa: A002 - its name there
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """The arguments of liger-kernel 0.6.2; later ones are behind them."""
    assert (ce_weight, lse_square_scale, label_smoothing, return_z_loss) == (None, 0.0, 0.0, False)
    assert reduction == "sum"
    assert input.dtype == weight.dtype
    found: Tensor = _Fused.apply(input, weight, target, bias, softcap, accum_dtype)  # type: ignore[no-untyped-call]
    return found


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """``liger_kernel.transformers.functional`` with nothing but the stand-in."""
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["liger_kernel.transformers.functional"].liger_fused_linear_cross_entropy = (  # type: ignore[attr-defined]
        liger_fused_linear_cross_entropy
    )


def student_of(family: str, autocast: torch.dtype | None = None) -> Student:
    """A tiny random model of a family that makes its logits in its own way."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, options = FAMILIES[family]
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, bos_token_id=0, eos_token_id=1, **sizes, **options)
    )
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return Student(model, CPU, autocast, 24)


def scored(student: Student, micro: Any, loss: Any, liger: bool) -> tuple[float, Tensor, list[Tensor]]:
    """Value, sums and gradients of CE times 0.3."""
    student.model.zero_grad(set_to_none=True)
    value, sums = score(Objective(student, [loss], liger), micro, (0.3, 0.0))
    value.backward()
    return float(value.detach()), sums, [p.grad for p in student.model.parameters() if p.grad is not None]


@pytest.fixture
def lesson(make_targets: Callable[..., str], pair: Any) -> tuple[Any, Any]:
    """A micro-batch and the loss ce."""
    loss = open_loss("ce", pair.setup())
    layout = Layout(0, 32, 24, (loss,))
    sources = Sources([Targets(make_targets([[9, 12, 5, 7]]))])
    with Loader(sources, layout, step_tokens=30, micro_tokens=64, seed=0, packing=False) as loader:
        return loader.step().micros[0], loss


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradient_are_those_of_our_blocks(lesson: tuple[Any, Any], family: str) -> None:
    student = student_of(family)
    assert student.head.fusable
    assert (student.head.scale != 1) == family.startswith("scaled")
    assert (student.head.softcap is not None) == (family == "capped")
    assert (student.head.bias_M is not None) == (family == "biased")
    value, sums, grads = scored(student, *lesson, liger=False)
    found, found_sums, found_grads = scored(student, *lesson, liger=True)
    assert found == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(found_sums, sums.cpu(), rtol=1e-5, atol=1e-6)
    assert len(found_grads) == len(grads)
    for one, other in zip(found_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("stand_in")
def test_the_gradient_of_the_head_is_added_up_in_float32(lesson: tuple[Any, Any]) -> None:
    """Under bfloat16 it is rounded once, at its end: to what float32 sums round to, element for element."""
    student = student_of("plain", torch.bfloat16)
    scored(student, *lesson, liger=True)
    found = student.model.get_output_embeddings().weight.grad[:24].clone()
    weight = student.model.get_output_embeddings().weight[:24].detach().bfloat16()
    with torch.no_grad():
        states = student.states(lesson[0]).bfloat16()
    labels, sums = torch.from_numpy(lesson[0].label_P).long(), torch.zeros(24, 16)
    for low in range(0, len(states), CHUNK):
        leaf = weight.clone().requires_grad_()
        logits = torch.nn.functional.linear(states[low : low + CHUNK], leaf).float()
        (grad,) = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits, labels[low : low + CHUNK], reduction="sum"), leaf
        )
        sums += grad.float()
    expected = (sums.bfloat16() * torch.tensor(0.3, dtype=torch.bfloat16)).float()
    assert torch.equal(found, expected)
    assert len(states) > 4 * CHUNK, "several chunks"


@pytest.mark.usefixtures("stand_in")
def test_a_head_that_is_not_fusable_does_without(lesson: tuple[Any, Any]) -> None:
    """Such a model has no matrix to give to the kernel."""
    cuda, chosen = torch.device("cuda"), StudentGroup(student="acme/odd")
    assert use_liger(chosen, ["ce"], cuda, fusable=True)
    assert not use_liger(chosen, ["ce"], cuda, fusable=False)
    assert not use_liger(chosen, ["ce"], CPU, fusable=True)
    chosen = StudentGroup(student="acme/odd", kernel="liger")
    with pytest.raises(XtokenError, match="--kernel liger needs the matrix of the head, and acme/odd makes"):
        use_liger(chosen, ["ce"], cuda, fusable=False)
    student = student_of("plain")
    whole = Student(student.model, CPU, None, 24, Head(student.model, fusable=False, positions=True))
    value, _, grads = scored(student, *lesson, liger=False)
    found, _, found_grads = scored(whole, *lesson, liger=False)
    assert found == pytest.approx(value, rel=1e-5)
    for one, other in zip(found_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
