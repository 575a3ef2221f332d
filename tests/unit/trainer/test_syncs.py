"""Operations that wait for a GPU, counted: what asks a tensor for a size or a number empties the queue of kernels.

On a CPU nothing waits, but the operations are the same, and torch shows each of them on its way.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import xtoken.trainer.blocks as blocks_module
from xtoken.schemas.losses import LOSSES
from xtoken.trainer.blocks import spans
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import owners
from xtoken.trainer.losses.divergence import ranges
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.score import score
from xtoken.trainer.student.model import load_student

CPU = torch.device("cpu")
_WAIT = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select"}
# In a block at most, by loss: what depends on numbers that only the targets' values tell. All others wait for nothing.
MOST = {"p-kl": 2, "mined": 7, "byte-prefix": 4, "alm": 1, "h-kl": 1, "uld": 4, "gold": 4}
PER_PASS = 2  # the values of the terms, and what backward multiplies by


class Waits(TorchDispatchMode):
    """Counts what a GPU would have to finish for."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        sizeless = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if name in _WAIT or sizeless or masked:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_what_waits_is_counted() -> None:
    with Waits() as waits:
        some = torch.arange(4)
        some[some > 1].sum().item()
        torch.unique(some)
        torch.repeat_interleave(some, some)
        torch.repeat_interleave(some, some, output_size=6)
        some[some.clone()] = some + 1
        some[some > 2] = 1
    assert sum(waits.found.values()) == 5, waits.found


def test_sizes_that_are_known_are_not_asked_for() -> None:
    count, start = torch.tensor([2, 0, 3]), torch.tensor([4, 9, 1])
    with Waits() as waits:
        given = [owners(count, 5), *ranges(start, count, 5)]
    assert not waits.found
    for one, other in zip(given, [owners(count), *ranges(start, count)], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_a_block_hardly_waits(
    make_targets: Callable[..., str], student_dir: str, pair: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The more blocks a pass has, the more waits, and by no more than ``MOST`` each, forward and backward."""
    loss = open_loss(name, pair.setup())
    root = make_targets([[9, 12, 5, 7, 11], [6, 8, 10]], losses=(name,))
    sources, layout = Sources([Targets(root)]), Layout(0, 32, 24, (loss,))
    with Loader(sources, layout, step_tokens=200, micro_tokens=200, seed=0, packing=False) as loader:
        micro = loader.step().micros[0]
    objective, found = Objective(Student(load_student(student_dir, CPU, False), CPU, None, 24), [loss]), []
    assert objective.student.head.fusable  # looked for once
    for positions in (1000, 8):
        monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * positions)
        count = len(list(spans(micro, 24, [loss], CPU)))
        with Waits() as waits:
            score(objective, micro, (0.5, 0.5))[0].backward()
        found.append((count, sum(waits.found.values()), waits.found))
    (one, first, _), (many, then, kinds) = found
    assert one == 1
    assert many > 3
    assert then - first <= MOST.get(name, 0) * (many - one), kinds
    assert first <= PER_PASS + MOST.get(name, 0), found[0]
