"""Whole rows where vLLM's workers have the hidden states: one computation behind a seam in each of its model runners.

Both runners make logits of a prompt's hidden states, and of these the top k and the label's rank; the rest (chunks of a
prompt, preemption, transport) lies around that. ``WorkerRows`` stands in for this step for requests that ask for as
many entries as ``Whole.width``; others are vLLM's own. Runner V1 (CPUs, and some models on a GPU) has a method for
it, runner V2 (GPUs) a function.

Under tensor parallelism each worker reads its own slice of the vocabulary, where that can be had (``vllm_slices``).

Shapes: N rows, H hidden, W further columns (see ``vllm_whole``), U columns of the head that a worker reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.teachers.fast_rows import Reader, open_reader
from xtoken.pipeline.teachers.logit_rows import BLOCK_LOGITS, RowFigures
from xtoken.pipeline.teachers.vllm_parent import EndsWithParent
from xtoken.pipeline.teachers.vllm_slices import HeadSlice, Logits, find_slice, swapped
from xtoken.pipeline.teachers.vllm_whole import UNIFORMS, Whole

BLOCK_ROWS = 1024  # most rows whose logits exist at once on a GPU, as in vLLM's own code
_V1, _V2 = "_get_prompt_logprobs_dict", "prompt_logprobs_worker"
_V2_FUNCTION = "compute_prompt_logprobs_with_chunking"


class WorkerExtension(EndsWithParent):
    """Becomes a base class of vLLM's workers (``worker_extension_cls``)."""

    xtoken_trial: "Trial"

    def xtoken_whole_rows(self, sliced: bool, *wire: Any) -> str | None:
        """From now on requests for ``Whole.width`` entries get whole rows, on trial at first.

        Args:
            sliced: of several workers, each reads its own slice of the vocabulary, if it can.
            wire: see ``Whole.wire``.

        Returns:
            Why every worker gathers the logits of all; None where none does.

        Raises:
            AttributeError: this release's runners have no such seam.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        whole = Whole.from_wire(*wire)
        own, why = find_slice(runner, len(whole.starts_U)) if sliced else (None, "so it was asked")
        self.xtoken_trial = install(runner, whole, own)
        return why

    def xtoken_tried(self, over: bool) -> str | None:
        """What went wrong in the trial, None where nothing did; and whether it is over."""
        self.xtoken_trial.on = not over
        return self.xtoken_trial.error


@dataclass
class Trial:
    """While it is on, an error of ours does not end the engine: vLLM's own code does the step, and the error is kept.

    What it gives instead is never used (see ``xtoken.pipeline.teachers.vllm_engine``).
    """

    on: bool = True
    error: str | None = None

    def __call__(self, ours: Callable[..., Any], original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """``ours``, called as vLLM calls its ``original``."""
        try:
            return ours(*given, **named)
        except Exception as error:  # whatever another version's insides may raise
            if not self.on:
                raise
            self.error = f"{type(error).__name__}: {error}"
        return original(*given, **named)


class Columns(NamedTuple):
    """What both runners take of a step: ids int64 and floats float32 [N, 1 + W], ranks int64 [N]."""

    ids: Tensor
    floats: Tensor
    ranks: Tensor


def rows_from_hidden(
    hidden_NH: Tensor,
    target_N: Tensor,
    logits_fn: Logits,
    reader: Reader,
    vocabulary: int,
    block: int,
    uniform_N: NDArray[np.float64] | None = None,
) -> RowFigures:
    """Figures of rows, from hidden states.

    Args:
        hidden_NH: of the positions that predict.
        target_N: int64, the labels.
        logits_fn: logits [n, U] of some of the hidden states, newly allocated.
        reader: computes them.
        vocabulary: tokens of the whole head.
        block: rows whose logits exist at once.
        uniform_N: the rows' numbers, where the reader samples.
    """
    parts = []
    for start in range(0, len(target_N), block):
        some = slice(start, start + block)
        logits_NU = logits_fn(hidden_NH[some]).float()
        # A row that is nobody's, such as that of a prompt's last token, may have any number for a label.
        label_N = target_N[some].clamp(0, vocabulary - 1)
        parts.append(reader.figures(logits_NU, label_N, None if uniform_N is None else uniform_N[some]))
    return RowFigures.joined(parts)


@dataclass(frozen=True)
class WorkerRows:
    """``rows_from_hidden`` for what was asked for, in the columns in which vLLM carries it."""

    whole: Whole
    reader: Reader
    block: int
    own: HeadSlice | None

    @classmethod
    def of(cls, whole: Whole, device: torch.device, own: HeadSlice | None) -> "WorkerRows":
        """With blocks of the size that suits the device, and Triton's kernels where they are right on it."""
        width, first, group = (len(whole.starts_U), 0, None) if own is None else (own.width, own.first, own.group)
        rows = BLOCK_LOGITS.get(device.type, BLOCK_LOGITS["cuda"]) // width
        reader = open_reader(whole.reader(device), device, width, first, group)
        return cls(whole, reader, max(1, min(BLOCK_ROWS, rows)), own)

    def __call__(
        self, hidden_NH: Tensor, target_N: Tensor, logits_fn: Logits, uniform_N: NDArray[np.float64] | None
    ) -> Columns:
        """The columns of rows; the same on every worker."""
        uniform_N = None if self.whole.sampler is None else uniform_N
        logits_fn = logits_fn if self.own is None else partial(self.own.logits, logits_fn)
        vocabulary = len(self.whole.starts_U)
        found = rows_from_hidden(hidden_NH, target_N, logits_fn, self.reader, vocabulary, self.block, uniform_N)
        return Columns(*self.whole.packed(found, target_N), found.target_rank)


def install(runner: Any, whole: Whole, own: HeadSlice | None = None) -> Trial:
    """Put whole rows behind the seam of a model runner; once more is for other rows.

    Args:
        runner: of either kind.
        whole: what is wanted of rows.
        own: what of the head this worker reads; None: gathered logits, or there is one worker.

    Raises:
        AttributeError: it has no seam that is known here.
    """
    rows, trial = WorkerRows.of(whole, runner.device, own), Trial()
    if hasattr(runner, _V2):
        if getattr(runner, _V2) is not None:  # only the last stage of a pipeline has it
            StepRows(getattr(runner, _V2), rows, trial).install()
    else:
        original = partial(getattr(type(runner), _V1), runner)
        setattr(runner, _V1, partial(trial, partial(prompt_rows, runner, original, rows), original))
    return trial


def numbers(sampling: Any) -> NDArray[np.float64] | None:
    """Of a request for sampled tokens, the number of each row of its prompt."""
    found = (sampling.extra_args or {}).get(UNIFORMS)
    return None if found is None else np.frombuffer(found, np.float64)


# -- runner V1 ---------------------------------------------------------------------------------------------------------


def prompt_rows(
    runner: Any, original: Callable[..., Any], rows: WorkerRows, hidden_states: Tensor, num_scheduled_tokens: Any
) -> dict[str, Any]:
    """In place of a V1 runner's ``_get_prompt_logprobs_dict``: its own loop, one of our requests at a time.

    The loop sees a model whose logits are hidden states, and a sampler that makes rows of them.
    """
    asked: dict[str, int] = runner.num_prompt_logprobs
    ours = [name for name, entries in asked.items() if entries == rows.whole.width]
    found: dict[str, Any] = {}
    for name in ours:
        own = {name: asked[name]}
        request = runner.requests[name]
        step = _Step(rows, runner.model.compute_logits, numbers(request.sampling_params), request.num_computed_tokens)
        with swapped(runner, num_prompt_logprobs=own, model=_HiddenStates, sampler=step):
            found |= original(hidden_states, num_scheduled_tokens)
        if not own:  # the prompt's last rows
            del asked[name]
    others = {name: entries for name, entries in asked.items() if name not in ours}
    with swapped(runner, num_prompt_logprobs=others):
        found |= original(hidden_states, num_scheduled_tokens)
    for name in set(asked).difference(others, ours):
        del asked[name]
    return found


class _HiddenStates:
    """In place of a model: what it is asked for are hidden states."""

    @staticmethod
    def compute_logits(hidden_NH: Tensor) -> Tensor:
        return hidden_NH


@dataclass(frozen=True)
class _Step:
    """In place of a sampler, for the rows of one prompt from number ``start`` on."""

    rows: WorkerRows
    logits_fn: Logits
    numbers: NDArray[np.float64] | None
    start: int

    @staticmethod
    def compute_logprobs(hidden_NH: Tensor) -> Tensor:
        return hidden_NH

    def gather_logprobs(self, hidden_NH: Tensor, width: int, target_N: Tensor) -> Columns:
        assert width == self.rows.whole.width
        uniform_N = None if self.numbers is None else self.numbers[self.start : self.start + len(target_N)]
        return self.rows(hidden_NH, target_N.long(), self.logits_fn, uniform_N)


# -- runner V2 ---------------------------------------------------------------------------------------------------------


class StepRows:
    """In place of the function with which a V2 runner's ``PromptLogprobsWorker`` computes all rows of a step.

    The function is told neither whose the rows are nor where they begin, so the worker's methods are wrapped, too: they
    know the numbers of each prompt, and put the function in its place for as long as a step takes.
    """

    def __init__(self, worker: Any, rows: WorkerRows, trial: Trial) -> None:
        self._worker = worker
        self._rows = rows
        self._trial = trial
        self._numbers: dict[str, NDArray[np.float64]] = {}

    def install(self) -> None:
        """Wrap the worker's methods."""
        for name in ("add_request", "remove_request", "compute_prompt_logprobs"):
            original = partial(getattr(type(self._worker), name), self._worker)
            setattr(self._worker, name, partial(self._trial, partial(getattr(self, name), original), original))

    def add_request(self, original: Callable[..., Any], name: str, index: int, sampling: Any) -> None:
        """Remember a prompt's numbers."""
        found = numbers(sampling)
        if found is not None:
            self._numbers[name] = found
        original(name, index, sampling)

    def remove_request(self, original: Callable[..., Any], name: str) -> None:
        """Forget them."""
        self._numbers.pop(name, None)
        original(name)

    def compute_prompt_logprobs(
        self, original: Callable[..., Any], logits_fn: Logits, hidden_states: Tensor, batch: Any, *more: Any
    ) -> Any:
        """The rows of a step, by ``columns``."""
        from vllm.v1.worker.gpu.sample import prompt_logprob

        original_function = getattr(prompt_logprob, _V2_FUNCTION)
        ours = partial(self.columns, original_function, self._uniforms(batch))
        function = partial(self._trial, ours, original_function)
        with swapped(prompt_logprob, **{_V2_FUNCTION: function}):
            return original(logits_fn, hidden_states, batch, *more)

    def _uniforms(self, batch: Any) -> NDArray[np.float64]:
        """[N] of all tokens of a step; those of prompts that are not sampled for have any number."""
        uniform_N = np.full(batch.num_tokens, 0.5)
        for index, name in enumerate(batch.req_ids):
            if name in self._numbers:
                row, at = int(batch.num_computed_prefill_tokens_np[index]), int(batch.query_start_loc_np[index])
                own = self._numbers[name][row : row + int(batch.num_scheduled_tokens[index])]
                uniform_N[at : at + len(own)] = own
        return uniform_N

    def columns(
        self,
        original: Callable[..., Any],
        uniform_N: NDArray[np.float64],
        target_N: Tensor,
        hidden_NH: Tensor,
        logits_fn: Logits,
        width: int,
        *more: Any,
    ) -> Any:
        """In place of ``compute_prompt_logprobs_with_chunking``, where rows of our width are in the step.

        Rows of others have fewer columns, the first of ours: those of the label and the top k are the same.
        """
        if width != self._rows.whole.width:
            return original(target_N, hidden_NH, logits_fn, width, *more)
        return self._rows(hidden_NH, target_N.long(), logits_fn, uniform_N)
