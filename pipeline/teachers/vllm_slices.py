"""Logits of one of vLLM's workers before they are gathered: its own slice of the vocabulary, under tensor parallelism.

vLLM's head multiplies with the columns that lie on a worker, and then every worker gets the logits of all. Of rows only
a few numbers need to cross the wire (see ``sliced_rows``), so the gathering is left out while ours are read. What this
leans on in vLLM is looked at once, on one made hidden state; where anything is otherwise, all workers gather.

Shapes: N rows, H hidden, U columns of a slice, those that pad the head included.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HeadSlice:
    """What of the output head lies on this worker.

    Attributes:
        first: the id of its first column.
        tokens: columns that are tokens; those behind them pad the head.
        width: U.
        group: all workers, in the order of their slices.
    """

    first: int
    tokens: int
    width: int
    group: dist.ProcessGroup

    def logits(self, logits_fn: Logits, hidden_NH: Tensor) -> Tensor:
        """[N, U] with -inf in columns that pad, by what would give those of the whole vocabulary."""
        with _ungathered():
            logits_NU = logits_fn(hidden_NH)
        logits_NU[:, self.tokens :] = -torch.inf  # after scale and soft cap, which leave no -inf
        return logits_NU


def find_slice(runner: Any, vocabulary: int) -> tuple[HeadSlice | None, str | None]:
    """The slice of a model runner's worker, or why its logits are to be gathered; the same answer on all workers.

    Both are None where one worker has the whole head. Workers wait for each other here.
    """
    try:
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        others, own_group, workers = group.cpu_group, group.device_group, int(group.world_size)
    except (ImportError, AttributeError, AssertionError) as error:  # every worker has the same vLLM
        return None, f"vLLM's group of workers is not where it was: {error}"
    if workers == 1:
        return None, None
    own, why = None, None
    try:
        own = _own_slice(runner, own_group)
    except Exception as error:  # whatever another version's insides may raise, here alone
        why = f"{type(error).__name__}: {error}"
    told: list[Any] = [None] * dist.get_world_size(others)
    dist.all_gather_object(told, (why, own and (own.first, own.tokens, own.width)), group=others)
    why = next((why for why, _ in told if why is not None), None)
    if why is None:
        why = _misfit([place for _, place in told], vocabulary)
    return (own, None) if why is None else (None, why)


def _own_slice(runner: Any, group: dist.ProcessGroup) -> HeadSlice:
    size = runner.model_config.get_hidden_size()
    with torch.inference_mode(), _ungathered() as heads:
        logits_1U = runner.model.compute_logits(torch.zeros(1, size, dtype=runner.dtype, device=runner.device))
    if len(heads) != 1:
        raise ValueError(f"{len(heads)} heads made the logits, where there is one")
    shard, width = heads[0].shard_indices, logits_1U.shape[1]
    if shard.num_added_elements_padded or width != shard.num_org_elements_padded:
        raise ValueError(f"the logits have {width} columns, where the slice's head has {shard.num_org_elements_padded}")
    return HeadSlice(shard.org_vocab_start_index, shard.num_org_elements, width, group)


def _misfit(places: list[tuple[int, int, int]], vocabulary: int) -> str | None:
    """What is wrong with the slices of all workers: their first ids, tokens and widths."""
    end = 0
    for first, tokens, width in places:
        if first != end or width != places[0][2]:
            return f"slices do not follow each other: {places}"
        end += tokens
    return None if end == vocabulary else f"slices of {end} tokens in all, where the head has {vocabulary}"


@contextmanager
def _ungathered() -> Iterator[list[Any]]:
    """Heads that make logits inside, which stay on their worker."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    heads: list[Any] = []
    original = LogitsProcessor._get_logits

    def seen(processor: Any, hidden_NH: Tensor, head: Any, *more: Any, **named: Any) -> Any:
        heads.append(head)
        return original(processor, hidden_NH, head, *more, **named)

    with swapped(LogitsProcessor, _get_logits=seen, _gather_logits=lambda _, logits: logits):
        yield heads


@contextmanager
def swapped(owner: Any, **others: Any) -> Iterator[None]:
    """Attributes of an object or a class, or names of a module, are others inside."""
    before = {name: getattr(owner, name) for name in others}
    for name, value in others.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
