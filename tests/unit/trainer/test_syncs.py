"""Operations that wait for a GPU, counted: what asks a tensor for a size or a number empties the queue of kernels.

On a CPU nothing waits, but the operations are the same, and torch shows each of them on its way.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
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
from xtoken.trainer.pieces import cut
from xtoken.trainer.score import score_states
from xtoken.trainer.student.model import load_student

CPU = torch.device("cpu")
_WAIT = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select"}
_PER_PASS = 1  # what backward multiplies by, which is asked on a CPU alone
# Every loss, and options of it that take another way.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LOSSES),
    ("p-kl", {"learn_w": True}),
    ("p-kl", {"rest": "drop"}),
    ("p-kl", {"merge": "mean"}),
    ("h-kl", {"merge": "mean"}),
    ("h-kl", {"uld_weight": 0.0}),
    ("alm", {"debias": ["outcome", "merge"]}),
    ("byte-prefix", {"prefix": ["interior"]}),
    ("gold", {"beta": 1.0}),
    ("uld", {"merge": "last"}),
]


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


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_pass_waits_for_nothing(
    make_targets: Callable[..., str],
    student_dir: str,
    pair: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
) -> None:
    """Forward and backward of one block and of many, with agreement, of micro-batches that are cut already."""
    merge, options = options.get("merge", "first"), {key: one for key, one in options.items() if key != "merge"}
    loss = open_loss(name, replace(pair.setup(**options), merge=merge))
    root = make_targets([[9, 12, 5, 7, 11], [6, 8, 10]], losses=(name,))
    sources, layout = Sources([Targets(root)]), Layout(0, 32, 24, (loss,))
    objective = Objective(Student(load_student(student_dir, CPU, False), CPU, None, 24), [loss])
    assert objective.student.head.fusable  # looked for once
    for positions in (1000, 8):
        monkeypatch.setattr(blocks_module, "BLOCK_ELEMENTS", 24 * positions)
        with Loader(sources, layout, step_tokens=200, micro_tokens=200, seed=0) as loader:
            micro = loader.step().micros[0]
        micro = replace(micro, pieces=cut(micro, 24, [loss], CPU))
        count = len(list(spans(micro, 24, [loss], CPU)))
        assert count == 1 if positions == 1000 else count > 3
        states_PH = objective.student.states(micro)  # attention over rows asks transformers whether they are packed
        with Waits() as waits:
            score_states(objective, micro, states_PH, (0.5, 0.5), agree=True)[0].backward()
        assert sum(waits.found.values()) <= _PER_PASS, waits.found
