"""Products of half-precision matrices in float32, and how large blocks are.

The kernels are a GPU's: here they are the same operations of torch, given to the CPU for the length of a test.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import xtoken.trainer.products as products
from xtoken.trainer.blocks import block_rows, gpu_rows
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.products import add_product, even, linear, widened, widens
from xtoken.trainer.score import score
from xtoken.trainer.student.model import load_student

CPU = torch.device("cpu")
HALF = torch.bfloat16
FLOAT32 = 2e-6  # relative, of sums of a few hundred products in float32
GIB = 1 << 30


def _mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    return left.to(out_dtype) @ right.to(out_dtype)


def _addmm(
    total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, beta: int = 1, alpha: int = 1, out: Tensor
) -> Tensor:
    assert (beta, alpha) == (1, 1)
    return out.copy_(total + left.to(out_dtype) @ right.to(out_dtype))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a GPU has, on the CPU: ``torch.mm`` and ``torch.addmm`` with another dtype for their result."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", _mm, "CPU")
    library.impl("addmm.dtype_out", _addmm, "CPU")
    monkeypatch.setattr(products, "widens", lambda matrix: matrix.dtype == HALF)
    yield
    library._destroy()


def some(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 3).to(dtype)


def test_who_widens() -> None:
    assert not widens(some(2, 3))
    with FakeTensorMode():
        for dtype, does in ((HALF, True), (torch.float16, True), (torch.float32, False)):
            assert widens(torch.empty(2, 3, dtype=dtype, device="cuda")) is does


@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_not_rounded_to_half(kernels: None, biased: bool) -> None:
    """As in float64 of the same inputs; the CPU's own product is off by a hundredth."""
    states_PH, weight_VH, bias_V = some(5, 300), some(7, 300), some(7) if biased else None
    wanted = states_PH.double() @ weight_VH.double().t() + (0 if bias_V is None else bias_V.double())
    found = linear(states_PH, weight_VH, bias_V)
    assert found.dtype == torch.float32
    size = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < FLOAT32 * size
    rounded = torch.nn.functional.linear(states_PH, weight_VH, bias_V)
    assert float((rounded - wanted).abs().max()) > 1e-4 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, HALF])
def test_the_cpu_is_as_it_was(dtype: torch.dtype) -> None:
    """To the bit: one product, widened where it is of half precision; sums in place where types agree."""
    states, weight, bias = (some(*shape, dtype=dtype) for shape in ((5, 30), (7, 30), (7,)))
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(linear(states, weight, bias), torch.nn.functional.linear(states, weight, bias).to(wide))
    total = some(5, 7, dtype=wide)
    wanted = total + states @ weight.t() if dtype == HALF else torch.addmm(total, states, weight.t())
    add_product(total, states, weight.t())
    assert torch.equal(total, wanted)


def test_sums_are_added_to_in_place(kernels: None) -> None:
    """Into a slice of the gradient, of a transposed matrix, with no rounding between."""
    buffer = some(9, 300, dtype=torch.float32)
    left, right, before = some(40, 7), some(40, 300), buffer.clone()
    add_product(buffer[:7], left.t(), right)
    wanted = before[:7].double() + left.double().t() @ right.double()
    assert float((buffer[:7] - wanted).abs().max()) < FLOAT32 * float(wanted.abs().max())
    assert torch.equal(buffer[7:], before[7:])


@pytest.mark.parametrize("name", ["p-kl", "ce", "alm"])
def test_a_pass_in_half_precision(
    make_targets: Callable[..., str], student_dir: str, pair: Any, name: str, request: pytest.FixtureRequest
) -> None:
    """Loss and gradient of the head against float64 from the same rounded states and weights: nearer than before."""
    loss = open_loss(name, pair.setup())
    sources, layout = Sources([Targets(make_targets([[9, 12, 5], [6, 8]], losses=(name,)))]), Layout(0, 32, 24, (loss,))
    with Loader(sources, layout, step_tokens=60, micro_tokens=80, seed=0, packing=False) as loader:
        micro = loader.step().micros[0]

    def run(model: Any, autocast: torch.dtype | None) -> tuple[float, Tensor]:
        objective = Objective(Student(model, CPU, autocast, 24), [loss])
        value, _ = score(objective, micro, (0.5, 0.5))
        value.backward()
        return float(value.detach()), model.get_output_embeddings().weight.grad.double()

    def rounded(seed: int) -> Any:
        model = load_student(student_dir, CPU, False)
        torch.manual_seed(seed)
        with torch.no_grad():  # far from flat, untied, and exact in bfloat16, so that only products round
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight).mul(9).bfloat16().float())
        return model

    def apart(seed: int) -> tuple[float, float]:
        exact_value, exact = run(rounded(seed), None)
        value, grad = run(rounded(seed), HALF)
        return abs(value - exact_value), float((grad - exact).norm())

    before = [apart(seed) for seed in range(4)]
    request.getfixturevalue("kernels")
    after = [apart(seed) for seed in range(4)]
    assert before != after, "the other kernels were used"
    assert sum(value for value, _ in after) < 1.2 * sum(value for value, _ in before)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-gradient", "measured"])
@pytest.mark.parametrize("name", ["p-kl", "h-kl", "ce"])
def test_columns_beside_the_vocabulary_change_nothing(
    make_targets: Callable[..., str],
    student_dir: str,
    pair: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mixed: bool,
) -> None:
    """The head's padding is multiplied along and cut: same loss, same gradients, none for the padding."""
    loss = open_loss(name, pair.setup())
    sources, layout = Sources([Targets(make_targets([[9, 12, 5], [6, 8]], losses=(name,)))]), Layout(0, 32, 24, (loss,))
    with Loader(sources, layout, step_tokens=60, micro_tokens=80, seed=0, packing=False) as loader:
        micro = loader.step().micros[0]

    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        model = load_student(student_dir, CPU, False).double()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        value, sums = score(Objective(Student(model, CPU, None, 24), [loss]), micro, (0.5, 0.5), norms=mixed)
        value.backward()
        return value.detach(), sums, [one.grad for one in model.parameters()]

    value, sums, grads = run()
    monkeypatch.setattr("xtoken.trainer.objective.even", lambda size, most, _: min(size + 5, most))
    wide_value, wide_sums, wide_grads = run()
    torch.testing.assert_close(wide_value, value)
    torch.testing.assert_close(wide_sums, sums)
    for one, other in zip(wide_grads, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_widths_that_a_gpu_likes() -> None:
    gpu = torch.device("cuda", 1)
    assert even(151_669, 151_936, gpu) == 151_672
    assert [even(size, 32, gpu) for size in (24, 25, 32)] == [24, 32, 32]
    assert even(29, 30, gpu) == 29, "a head that has no more rows"
    assert even(151_669, 151_936, CPU) == 151_669
    rows = some(2, 3)
    assert widened(rows, 3, HALF) is rows
    assert widened(rows, 5, torch.float32).tolist() == [[*row, 0, 0] for row in rows.tolist()]


@pytest.mark.parametrize(
    ("vocabulary", "memory", "rows"),
    [
        (128_256, 80 * GIB, 2304),  # Llama 3, an H100
        (151_669, 80 * GIB, 1792),  # Qwen 3
        (262_144, 24 * GIB, 256),  # Gemma 3, a card of 24 GB: 341 rows, one tile
        (262_144, 8 * GIB, 256),  # never less
        (49_152, 140 * GIB, 10_496),
    ],
)
def test_blocks_of_a_gpu_are_whole_tiles_of_a_share_of_it(vocabulary: int, memory: int, rows: int) -> None:
    assert gpu_rows(vocabulary, memory) == rows
    assert rows == 256 or 12 * 24 * vocabulary * rows <= memory


def test_blocks_of_the_cpu_are_as_they_were() -> None:
    assert [block_rows(vocabulary, CPU) for vocabulary in (24, 128_256, 1 << 25)] == [(1 << 24) // 24, 130, 1]


def test_blocks_of_a_gpu_follow_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    assert block_rows(128_256, torch.device("cuda", 3)) == gpu_rows(128_256, 80 * GIB)
