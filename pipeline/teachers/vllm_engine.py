"""What of requests, steps and replies depends on vLLM's version, and the fast way out for rows.

vLLM's frontend makes Python objects of the tensors in which the engine hands it a
prompt's rows, entry by entry. The fast way keeps the tensors: ``install`` replaces the method of this process that
unpacks them, for requests that do not ask for the public flat form. A self-test compares the two on one reply when an
engine is opened, and on any difference only the public form is used. Whole rows (``vllm_worker``) come by the same way,
and are compared with the public form as well.

Shapes: T tokens of one prompt, R = T - 1 rows, K entries asked for; column 0 of K + 1 is the label.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers.base import EngineLost, Question
from xtoken.pipeline.teachers.vllm_options import MIN_STEP_TOKENS, multiprocessing_wanted, version
from xtoken.pipeline.teachers.vllm_replies import Entries, Neighbours, TensorRows, flat_entries, read_entries
from xtoken.pipeline.teachers.vllm_start import Overheard, is_gone, lacks_memory, watch
from xtoken.pipeline.teachers.vllm_whole import Whole

if find_spec("vllm") is None:
    raise ImportError("vllm is not installed", name="vllm")

WHOLE_ROWS, SLICED_ROWS, TENSORS = "vllm-rows", "vllm-sliced-rows", "vllm-tensors"
_UPDATE = "_update_prompt_logprobs"
_PROBE_TOKENS = 16
_PATIENCE_SECONDS = 600.0  # in which a worker may also compile kernels
_QUEUED_TOKENS = 509  # of prompts that fill a GPU's steps: a prime, so that a step ends within one of them
_SAME_RUN = 0.5  # nats between two runs of one prompt, whatever order kernels add up in; a wrong row is off by more
_LOG = logging.getLogger("xtoken")


def install() -> None:
    """Keep tensors as they are, in this process, for requests that do not ask for the flat form."""
    if _original() is None:
        _replace(_keep_tensors)


def uninstall() -> None:
    """vLLM's own method again."""
    original = _original()
    if original is not None:
        setattr(_processor(), _UPDATE, original)


def _replace(function: Callable[..., None], *more: Any) -> None:
    """Call ``function(processor, original method, *more, tensors)`` in place of the original method."""
    cls = _processor()
    setattr(cls, _UPDATE, partialmethod(function, getattr(cls, _UPDATE), *more))


def _original() -> Any:
    """vLLM's method where ``_replace`` put another in its place, else None."""
    found = vars(_processor()).get(_UPDATE)
    return found.args[0] if isinstance(found, partialmethod) else None


def _processor() -> Any:
    from vllm.v1.engine.logprobs import LogprobsProcessor

    return LogprobsProcessor


def _keep_tensors(processor: Any, original: Callable[..., None], tensors: Any) -> None:
    if isinstance(processor.prompt_logprobs, list):  # what a new request that asks for no flat form holds
        processor.prompt_logprobs = TensorRows()
    if isinstance(processor.prompt_logprobs, TensorRows):
        processor.prompt_logprobs.append(tensors)
    else:
        original(processor, tensors)


def _record(processor: Any, original: Callable[..., None], kept: TensorRows, tensors: Any) -> None:
    """What the self-test compares: the public form and the tensors it is made of."""
    kept.append(tensors)
    original(processor, tensors)


class Engine:
    """A ``vllm.LLM``, fed request by request; for one thread at a time, whichever it is."""

    def __init__(
        self,
        llm: Any,
        k: int,
        *,
        tensors: bool = True,
        heard: Overheard | None = None,
        whole: Whole | None = None,
    ) -> None:
        """Take over ``llm``.

        Args:
            llm: see ``start_llm``.
            k: entries that are asked for.
            tensors: False keeps to the public flat form.
            heard: what the engine's processes say.
            whole: what is wanted of whole rows, beside as many entries; None keeps to vLLM's own rows.
        """
        watch(llm)
        self._heard = heard or Overheard()
        self._llm = llm
        self._core = llm.llm_engine
        self._k = k
        self._names = itertools.count()
        self._answers: dict[str, Any] = {}
        self._fast = False
        self._sliced = False  # of several workers, each reads its own slice of the vocabulary
        self._neighbours = Neighbours()
        self.whole: Whole | None = None  # what of whole rows each reply holds that is not flat
        self.why_not_whole = "whole rows leave the engine as tensors only"
        if tensors:
            self._fast = self._tensors_are_right()
            self._say_if_rounded()
        if self._fast and whole is not None:
            self._open_whole(whole)

    @property
    def path(self) -> str:
        """Which way rows leave the engine, for the manifest."""
        if self.whole is not None:
            return SLICED_ROWS if self._sliced else WHOLE_ROWS
        return TENSORS if self._fast else "vllm-flat"

    @property
    def step_tokens(self) -> int:
        """Most tokens of one forward pass."""
        return int(self._core.vllm_config.scheduler_config.max_num_batched_tokens)

    @property
    def settings(self) -> dict[str, str | int | float | bool]:
        """What the engine settled on by itself."""
        runner = "v2" if getattr(self._core.vllm_config, "use_v2_model_runner", False) else "v1"
        return {"multiprocessing": multiprocessing_wanted(), "model_runner": runner}

    @property
    def head_dtype(self) -> str:
        """Precision of the logits: what the output head was asked for, unless rows of the self-test say otherwise."""
        dtype = str(self._llm.model_config.dtype).removeprefix("torch.")
        return dtype if self._neighbours.rounded else self._head_asked

    @property
    def _head_asked(self) -> str:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        config = self._llm.model_config
        known = hasattr(LogitsProcessor, "_apply_head")
        return str(config.head_dtype if known else config.dtype).removeprefix("torch.")

    def _say_if_rounded(self) -> None:
        """A model with its own way to logits may take no notice of what was asked for."""
        if self._neighbours.rounded and self.head_dtype != self._head_asked:
            share = self._neighbours.equal / self._neighbours.pairs
            _LOG.warning(
                "%s: logits of this model are rounded to %s, though a head in %s was asked for: "
                "%.0f %% of neighbouring entries are equal",
                *(version(), self.head_dtype, self._head_asked, 100 * share),
            )

    def add(self, ids: NDArray[np.int32], *, flat: bool = False) -> str:
        """Queue a prompt; its reply is found under the name returned."""
        if flat or self.whole is None:
            return self._add(ids, self._sampling(self._k, flat=flat or not self._fast))
        return self._add(ids, self._sampling(self.whole.width, flat=False, extra_args=self.whole.uniforms(ids)))

    def ask(self, question: Question) -> str:
        """Queue a prompt to be answered; the reply is found under the name returned."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=question.tokens,
            temperature=question.temperature,
            top_p=question.top_p,
            seed=question.seed,
            stop_token_ids=list(question.stops),
            ignore_eos=True,  # it is among the stops, if it is one
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return self._add(question.ids, sampling)

    def _add(self, ids: NDArray[np.int32], sampling: Any) -> str:
        from vllm.inputs import tokens_input

        name = str(next(self._names))
        with self._while_it_lives():
            self._core.add_request(name, tokens_input(ids.tolist()), sampling)
        return name

    def step(self) -> None:
        """Run the engine once, or wait for its process; replies are kept until they are taken.

        Raises:
            EngineLost: the engine's process is gone.
        """
        assert self._core.has_unfinished_requests(), "the engine forgot a request"
        with self._while_it_lives():
            outputs = self._core.step()
        for output in outputs:
            if output.finished:
                self._answers[output.request_id] = output

    @contextmanager
    def _while_it_lives(self) -> Iterator[None]:
        """Say what the engine's process died of, where vLLM says that it did."""
        try:
            yield
        except Exception as error:
            if not is_gone(self._llm):
                raise
            why = self._heard.root_cause() or "without a word; the system may have killed it for memory"
            way_out = "; a smaller --gpu-memory or --batch-tokens leaves it room" if lacks_memory(why) else ""
            raise EngineLost(f"the process of {version()}'s engine ended ({why}){way_out}") from error

    def take(self, names: Iterable[str]) -> list[tuple[str, Any]]:
        """Replies that are there, among ``names``."""
        return [(name, self._answers.pop(name)) for name in self._answers.keys() & set(names)]

    def score(self, batch: Sequence[NDArray[np.int32]], *, flat: bool = False) -> list[Any]:
        """Replies to all prompts, in order."""
        names = [self.add(ids, flat=flat) for ids in batch]
        while any(name not in self._answers for name in names):
            self.step()
        found = dict(self.take(names))
        return [found[name] for name in names]

    def abort(self, names: Sequence[str]) -> None:
        """Forget requests, answered or not."""
        if names:
            self._core.abort_request(list(names))
            self.take(names)

    def _sampling(self, entries: int, *, flat: bool, **more: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=entries,
            flat_logprobs=flat,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **more,
        )

    def _open_whole(self, whole: Whole) -> None:
        """Have whole rows from now on, if they pass their self-test; says why not."""
        self.whole = whole
        self._sliced = int(self._core.vllm_config.parallel_config.tensor_parallel_size) > 1
        reason = self._reason(self._whole_difference)
        if reason is not None and self._sliced:
            self._gather(reason)
            reason = self._reason(self._whole_difference)
        if reason is not None:
            self.whole, self.why_not_whole = None, reason
            _LOG.warning("%s: rows are of the top k only, whole ones failed their self-test (%s)", version(), reason)

    def _gather(self, reason: str) -> None:
        """Of several workers, none reads its own slice of the vocabulary; says why not."""
        self._sliced = False
        _LOG.warning("%s: every worker gathers whole logits, none reads its own slice of them (%s)", version(), reason)

    def _whole_difference(self) -> str | None:
        """How whole rows of a few prompts differ from the public way's, or what in them cannot be."""
        assert self.whole is not None
        why_gathered, *_ = self._call("xtoken_whole_rows", self._sliced, *self.whole.wire())
        if self._sliced and why_gathered is not None:
            self._gather(why_gathered)
        for ids, copies in self._probes():
            (public,) = self.score([ids], flat=True)
            expected = flat_entries(public.prompt_logprobs, len(ids) - 1, self._k)
            for output in self.score([ids] * copies):
                found = read_entries(output.prompt_logprobs, len(ids) - 1, self.whole.width)
                if (error := self._tried(over=False)) is not None:
                    return error
                if expected is None or found is None:
                    return "whole rows do not reach the reply"
                top, figures = self.whole.unpacked(found)
                if not (_alike(expected, top) and _same_first(expected, top)):
                    return "rows of the same prompt differ"
                if (wrong := self.whole.broken(figures) or self.whole.misfit(top, figures)) is not None:
                    return wrong
        return self._tried(over=True)

    def _tried(self, *, over: bool) -> str | None:
        """What went wrong in a worker since it has whole rows on trial; from then on it would end the engine."""
        return next((error for error in self._call("xtoken_tried", over) if error), None)

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """What each worker's method returns.

        Raises:
            EngineLost: one does not answer; its answer, should it come, would be taken for that to the next call.
        """
        try:
            return list(self._llm.collective_rpc(method, timeout=_PATIENCE_SECONDS, args=arguments))
        except Exception as error:
            if not isinstance(error, TimeoutError) and "timed out" not in str(error):  # an engine's process tells it so
                raise
            raise EngineLost(
                f"a worker of {version()}'s engine did not answer {method} for {_PATIENCE_SECONDS:g} s; one of its "
                "GPUs may hang ('nvidia-smi' and the log say more)"
            ) from error

    def _reason(self, test: Callable[[], str | None]) -> str | None:
        """Why a self-test fails; then nothing of it is left in the engine."""
        try:
            reason = test()
        except EngineLost:
            raise
        except Exception as error:  # whatever another version's insides may raise
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self.abort([str(name) for name in range(next(self._names))])
        return reason

    def _tensors_are_right(self) -> bool:
        """Whether tensors hold, entry by entry, what the public form says; says why not."""
        reason = self._reason(self._difference)
        if reason is None:
            return True
        uninstall()
        _LOG.warning("%s: rows take the public, slower path, the fast one failed its self-test (%s)", version(), reason)
        return False

    def _difference(self) -> str | None:
        """How the fast way's rows of a few prompts differ from the public way's, and install it."""
        for ids, copies in self._probes():
            kept, rows = TensorRows(), len(ids) - 1
            uninstall()
            _replace(_record, kept)
            (output,) = self.score([ids], flat=True)
            public = flat_entries(output.prompt_logprobs, rows, self._k)
            same = read_entries(kept, rows, self._k)
            if public is None or same is None or not _equal(public, same):
                return "tensors are not what the flat form is made of"
            self._neighbours = self._neighbours.and_of(public)
            uninstall()
            install()
            self._fast = True
            for output in self.score([ids] * copies):
                if not isinstance(output.prompt_logprobs, TensorRows):
                    return "tensors do not reach the reply"
                found = read_entries(output.prompt_logprobs, rows, self._k)
                if found is None or not _alike(public, found):
                    return "rows of the same prompt differ"
        return None

    def _probes(self) -> list[tuple[NDArray[np.int32], int]]:
        """Prompts, and how many times each is asked for at once: a short one, and one that takes two steps.

        A prompt takes two steps where it is longer than one, or where those queued before it leave it part of a step.
        On a GPU, where steps are large and soon done, so many copies wait that a step ends within one. On a CPU, where
        that would take long, a single prompt goes over the end of a small step, if prompts may be that long.
        """
        config = self._llm.model_config
        room, step = int(config.max_model_len) - 1, self.step_tokens
        probes = [(min(_PROBE_TOKENS, room), 1)]
        if step + _PROBE_TOKENS <= min(room, 8 * MIN_STEP_TOKENS):
            probes.append((step + _PROBE_TOKENS, 1))
        elif self._core.vllm_config.device_config.device_type != "cpu":
            length = next(one for one in range(min(room, _QUEUED_TOKENS), 0, -1) if step % one or one == 1)
            # the engine's process may have begun with the first few before the last arrive: twice a step, and one more
            probes.append((length, 2 * (step // length + 1)))
        # Away from both ends of the vocabulary, where models keep ids that mean more than text.
        quarter = config.get_vocab_size() // 4
        return [((quarter + np.arange(size) * 7919 % quarter).astype(np.int32), copies) for size, copies in probes]


def _equal(one: Entries, other: Entries) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))


def _alike(one: Entries, other: Entries) -> bool:
    """Two runs of one prompt: the same labels, probabilities near each other."""
    (token, logprob, _), (again, logprob_again, rank_again) = one, other
    near = np.abs(logprob - logprob_again).max() <= _SAME_RUN
    return bool((token[:, 0] == again[:, 0]).all() and near and (rank_again >= 1).all())


def _same_first(one: Entries, other: Entries) -> bool:
    """The same most probable tokens, in rows in which one is well above the next."""
    (token, logprob, _), (again, *_) = one, other
    if token.shape[1] < 3:
        return True
    clear = logprob[:, 1] - logprob[:, 2] > _SAME_RUN
    return bool((token[clear, 1] == again[clear, 1]).all())
