"""The production teacher: vLLM, prompt log-probabilities.

What depends on vLLM's version is in ``vllm_options``, ``vllm_start`` and ``vllm_engine``; here its replies are read,
checked, and made into rows.

Shapes: T tokens of one prompt, R = T - 1 rows, K entries asked for.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.teachers import model_source, needs_whole_rows
from xtoken.pipeline.teachers.base import Batch, Question, TeacherRows, check_prompt, entries_asked
from xtoken.pipeline.teachers.vllm_engine import SLICED_ROWS, TENSORS, WHOLE_ROWS, Engine
from xtoken.pipeline.teachers.vllm_memory import Gpu, alone_on_gpu
from xtoken.pipeline.teachers.vllm_options import (
    Options,
    Platform,
    engine_options,
    find_platform,
    settings_of,
    uses_v2,
    version,
)
from xtoken.pipeline.teachers.vllm_replies import read_entries
from xtoken.pipeline.teachers.vllm_rows import RULES, rows_from
from xtoken.pipeline.teachers.vllm_start import CannotStart, Overheard, lacks_memory, start_llm
from xtoken.pipeline.teachers.vllm_whole import Whole
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TeacherInfo

# Steps of work that the engine always has: one that runs, one that is queued, one that a batch may fall short of.
_STEPS_AHEAD = 3

_WAY_OUT = (
    "All that vLLM says of it is on standard error. It must know the model's architecture, and find config.json and "
    "safetensors weights; --backend hf runs teachers by transformers."
)
_Waiting = dict[str, tuple[Hashable, NDArray[np.int32]]]


class VllmTeacher:
    """One vLLM engine; see the module. For one thread at a time."""

    def __init__(
        self,
        engine: Engine,
        info: TeacherInfo,
        k: int,
        settings: dict[str, str | int | float | bool] | None = None,
        whole: Whole | None = None,
    ) -> None:
        self.info = info
        self.settings = settings or {}
        self._engine = engine
        self._k = k
        self._whole = whole

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        """Score sequences (see ``xtoken.pipeline.teachers.base.Teacher``).

        Where the engine gives no whole rows, ``lse``, ``space_logprob`` and ``tau_lognorm`` are None, and of equal
        log-probabilities across the k-th place vLLM chose which to give.

        Raises:
            XtokenError: a token the model has no row for, logits that are NaN or infinite, or a reply that is not what
                was asked.
        """
        return self._score(batch, flat=False)

    def second_path(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows] | None:
        """The same as vLLM itself computes it, by its public flat form; None where ``rows`` take that way.

        It has no sampled tokens: None where these are what is wanted.
        """
        another = self.info.capture_path in (TENSORS, WHOLE_ROWS, SLICED_ROWS)
        sampled = self._whole is not None and self._whole.sampler is not None
        return self._score(batch, flat=True) if another and not sampled else None

    def generate(self, questions: Sequence[Question]) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Answer prompts (see ``xtoken.pipeline.teachers.base.Teacher``).

        Raises:
            XtokenError: a reply without an answer, or with a token that is none.
        """
        for question in questions:
            check_prompt(question.ids, self.info)
        waiting = {self._engine.ask(question): number for number, question in enumerate(questions)}
        try:
            while waiting:
                found = self._engine.take(waiting)
                if not found:
                    self._engine.step()
                for name, output in found:
                    number = waiting.pop(name)
                    ids = np.array(output.outputs[0].token_ids, np.int32) if output.outputs else np.zeros(0, np.int32)
                    if not 1 <= len(ids) <= questions[number].tokens:
                        raise self._bad_reply(f"an answer of {len(ids)} tokens")
                    yield number, ids
        finally:
            self._engine.abort(list(waiting))

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        """Score batch after batch without a pause between them (see ``xtoken.pipeline.teachers.base.Teacher``).

        Raises:
            XtokenError: as ``rows``.
        """
        waiting: _Waiting = {}
        more = True
        try:
            while more or waiting:
                more = more and self._fill(waiting, batches)
                if waiting:
                    self._engine.step()
                for name, output in self._engine.take(waiting):
                    key, ids = waiting.pop(name)
                    yield key, self._read(ids, output, self._whole)
        finally:
            self._engine.abort(list(waiting))

    def _fill(self, waiting: _Waiting, batches: Iterator[Batch | None]) -> bool:
        """Give the engine prompts until it has enough to do; whether there may be more."""
        enough = _STEPS_AHEAD * self._engine.step_tokens
        while sum(len(ids) for _, ids in waiting.values()) < enough:
            try:
                batch = next(batches)
            except StopIteration:
                return False
            if batch is None:
                assert waiting, "nothing is ready and nothing is unanswered"
                return True
            for key, ids in batch:
                check_prompt(ids, self.info)
                waiting[self._engine.add(ids)] = key, ids
        return True

    def _score(self, batch: Sequence[NDArray[np.int32]], *, flat: bool) -> list[TeacherRows]:
        for ids in batch:
            check_prompt(ids, self.info)
        outputs = self._engine.score(batch, flat=flat)
        if len(outputs) != len(batch):
            raise self._bad_reply(f"{len(outputs)} outputs for {len(batch)} prompts")
        whole = None if flat else self._whole
        return [self._read(ids, output, whole) for ids, output in zip(batch, outputs, strict=True)]

    def _read(self, ids: NDArray[np.int32], output: Any, whole: Whole | None) -> TeacherRows:
        if not np.array_equal(output.prompt_token_ids, ids):
            raise self._bad_reply("the prompt came back with other token ids")
        width = self._k if whole is None else whole.width
        found = read_entries(output.prompt_logprobs, len(ids) - 1, width)
        if found is None:
            raise self._bad_reply(f"prompt rows are not {len(ids) - 1} of {width + 1} entries")
        figures = None
        if whole is not None:
            found, figures = whole.unpacked(found)
        rows, broken = rows_from(ids, found, self.info.vocab_rows)
        if broken:
            raise self._bad_reply(RULES[broken])
        if whole is None or figures is None:
            return rows
        if (wrong := whole.broken(figures)) is not None:
            raise self._bad_reply(wrong)
        return replace(rows, **figures._asdict())

    def _bad_reply(self, message: str) -> XtokenError:
        return XtokenError(
            f"{self.info.engine_version} did not answer what was asked ({message}); "
            "try --backend hf, or a vLLM release from 0.29 on"
        )


def open_teacher(
    config: TeacherGroup, codec: CodecGroup, table: TokenTable, *, engines: int = 1, tensors: bool = True
) -> VllmTeacher:
    """Start an engine for ``config.teacher`` (see ``xtoken.pipeline.teachers.open_teacher``).

    Args:
        config: see there.
        codec: see there.
        table: see there.
        engines: see there.
        tensors: take rows as tensors where the self-test allows it; False keeps to vLLM's public flat form.

    Raises:
        XtokenError: the request does not fit the model, vLLM cannot load it, or gives no whole rows where the codec
            needs them.
    """
    model_config = model_source.load_model_config(config)
    model_source.check_request(config, codec, model_config, table, spare=1)
    platform = find_platform()
    _check_device(config.device, platform.kind)
    dtype = config.dtype if config.dtype != "auto" else ("float32" if platform.cpu else "bfloat16")
    heard = Overheard()
    try:
        with alone_on_gpu(1 if platform.cpu else engines):
            options = _options(config, codec, model_config, dtype, platform, engines)
            llm = start_llm(options, heard)
    except CannotStart as error:
        if lacks_memory(str(error)):
            raise _no_room(config, options, error) from error
        raise model_source.cannot_load(config, error, _WAY_OUT) from error
    width = model_source.vocab_rows(model_config)
    k = entries_asked(codec, width)
    engine = Engine(llm, k, tensors=tensors, heard=heard, whole=Whole.of(codec, table, width))
    need = needs_whole_rows(codec)
    if engine.whole is None and need is not None:
        raise XtokenError(
            f"{need.option} needs whole teacher rows, and {version()} gives none here ({engine.why_not_whole}); use "
            f"another release of it from 0.29 on, --backend hf, or {need.instead}"
        )
    info = _info(config, model_config, dtype, platform, engine)
    return VllmTeacher(engine, info, k, {**settings_of(options), **engine.settings}, engine.whole)


def _options(
    config: TeacherGroup, codec: CodecGroup, model_config: Any, dtype: str, platform: Platform, engines: int
) -> Options:
    """Options for the model runner that vLLM is going to use with them."""
    gpu = None if platform.cpu else Gpu(platform.total, engines)
    options = engine_options(config, codec, model_config, dtype, gpu, v2=not platform.cpu)
    if platform.cpu or uses_v2(options):
        return options
    return engine_options(config, codec, model_config, dtype, gpu)


def _no_room(config: TeacherGroup, options: Options, error: CannotStart) -> XtokenError:
    share = options["gpu_memory_utilization"]
    return XtokenError(
        f"teacher {config.teacher!r} does not fit: {error}\n"
        f"The engine may take {share:g} of each GPU's memory (--gpu-memory). Free the GPU of other processes, divide "
        "the teacher among more GPUs (--tensor-parallel), or use a smaller --max-tokens, --batch-tokens or quantised "
        "weights."
    )


def _check_device(asked: str, found: str) -> None:
    if asked not in ("auto", found):
        raise XtokenError(
            f"--device {asked!r}: vllm chooses its device by itself and found {found!r}; "
            "use --device auto, and CUDA_VISIBLE_DEVICES to pick a GPU"
        )


def _info(config: TeacherGroup, model_config: Any, dtype: str, platform: Platform, engine: Engine) -> TeacherInfo:
    return TeacherInfo(
        model=config.teacher,
        backend="vllm",
        revision=model_source.revision(model_config),
        config_hash=model_source.config_hash(model_config),
        weights_hash=model_source.revision(model_config),  # of a folder, its worker says it
        vocab_rows=model_source.vocab_rows(model_config),
        context=model_source.context(model_config),
        dtype=dtype,
        head_dtype=engine.head_dtype,
        quantization=model_source.quantization(model_config),
        device=platform.name,
        tensor_parallel=config.tensor_parallel,
        capture_path=engine.path,
        engine_version=version(),
    )
