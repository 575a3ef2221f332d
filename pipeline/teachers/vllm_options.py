"""Where vLLM runs and with which options; what of them depends on its version.

0.29 to 0.33 are supported, and both of its model runners: a CPU gets V1, a GPU for most models V2.
"""

import contextlib
import os
import socket
from importlib import metadata
from typing import Any, NamedTuple

from xtoken.pipeline.teachers import model_source
from xtoken.pipeline.teachers.base import entries_asked
from xtoken.pipeline.teachers.vllm_memory import Gpu, memory_share
from xtoken.pipeline.teachers.vllm_whole import columns
from xtoken.pipeline.teachers.vllm_worker import WorkerExtension
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError

# Runner V1 makes the float32 log-softmax of one prompt's share of a step at once: 2 GB a copy at most.
_STEP_LOGITS = 1 << 29
MIN_STEP_TOKENS = 256
_MAX_SEQUENCES = 256


class Platform(NamedTuple):
    """Where vLLM runs; ``total`` bytes of memory of one GPU, 0 where that is not known."""

    kind: str
    name: str
    total: int = 0

    @property
    def cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.kind == "cpu"


def find_platform() -> Platform:
    """Import vLLM, with its defaults for our use set where the environment says nothing.

    Raises:
        XtokenError: it cannot be imported, or finds neither GPU nor CPU to run on.
    """
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # Standard output is for results, and errors of its processes are read from standard error.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
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
    return Platform("cpu", "cpu") if cpu else _gpu_platform(current_platform)


def _gpu_platform(current: Any) -> Platform:
    try:
        name = str(current.get_device_name())
    except (NotImplementedError, RuntimeError) as error:  # what vLLM falls back to has no name; a driver may be broken
        raise XtokenError(
            f"vllm finds no GPU on {socket.gethostname()}{f' ({error})' if str(error) else ''}; run this on a machine "
            "with one ('nvidia-smi' lists them; CUDA 13 wants driver 580 or newer), on a Ray cluster by 'ray job "
            "submit --entrypoint-num-gpus 1 -- xtoken ...', or use --backend hf"
        ) from error
    try:
        total = int(current.get_device_total_memory())
    except (NotImplementedError, RuntimeError, ValueError):
        total = 0
    return Platform(str(current.device_type), name, total)


def multiprocessing_wanted() -> bool:
    """Whether vLLM's engine runs in a process of its own."""
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "0"


Options = dict[str, str | int | float | bool | dict[str, str] | None]
"""Arguments of ``vllm.LLM``."""


def engine_options(
    config: TeacherGroup, codec: CodecGroup, model_config: Any, dtype: str, gpu: Gpu | None = None, *, v2: bool = False
) -> Options:
    """Arguments of ``vllm.LLM`` for ``config.teacher``.

    Args:
        config: what is asked for.
        codec: what is kept of it.
        model_config: the teacher's configuration.
        dtype: precision of its weights.
        gpu: what the engine runs on; None: a CPU, or a GPU that does not tell its size.
        v2: vLLM's newer model runner, which never holds more than a block of logits.
    """
    # BOS in front, and room for the one token that must be generated.
    longest = min(codec.max_tokens + 2, model_source.context(model_config))
    batch = config.batch_on("cpu" if gpu is None else "cuda")
    step = step_tokens(batch, longest, model_source.vocab_rows(model_config), v2=v2)
    options: Options = {
        "model": config.teacher,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": dtype,
        "seed": 0,
        "skip_tokenizer_init": True,
        # A model that also sees pictures is not asked to: without a tokenizer it could not start, and it starts sooner.
        "language_model_only": True,
        # Prefill in large steps gains nothing from CUDA graphs.
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        # Rows of cached prefixes would be missing or stale.
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": entries_asked(codec, model_source.vocab_rows(model_config)) + columns(codec),
        "max_model_len": longest,
        "max_num_batched_tokens": step,
        "max_num_seqs": min(_MAX_SEQUENCES, step),
        "gpu_memory_utilization": config.gpu_memory or memory_share(model_config, config.tensor_parallel, gpu, v2=v2),
        "tensor_parallel_size": config.tensor_parallel,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
    }
    if config.tensor_parallel > 1:
        options["distributed_executor_backend"] = "mp"
    if gpu is not None and gains_by_compiling(model_config, config.tensor_parallel) and _takes_graph_mode():
        options |= {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}}
    if dtype != "float32" and not _quantized_head(model_config):
        # A head in half precision fills most rows with ties.
        options["hf_overrides"] = {"head_dtype": "float32"}
    return options


def gains_by_compiling(model_config: Any, tensor_parallel: int) -> bool:
    """Whether vLLM fuses more of a model when it compiles it, without CUDA graphs.

    Quantising activations is fused with the norm before it, and adding up over GPUs with the norm behind it. Other
    models gain too little in large steps for the minute that compiling takes at each start.
    """
    return model_source.quantization(model_config) is not None or tensor_parallel > 1


def _takes_graph_mode() -> bool:
    """Whether the installed vLLM can compile without CUDA graphs."""
    with contextlib.suppress(Exception):  # whatever another version's configuration refuses
        from vllm.config import CompilationConfig

        given: Any = {"cudagraph_mode": "NONE"}
        return CompilationConfig(**given).cudagraph_mode.name == "NONE"
    return False


def step_tokens(asked: int, longest: int, rows: int, *, v2: bool) -> int:
    """Tokens of one forward pass, of prompts of at most ``longest`` tokens and logits of ``rows`` entries."""
    if not v2 and longest * rows > _STEP_LOGITS:  # logits exist for one prompt at a time, as far as it is in the step
        asked = min(asked, _STEP_LOGITS // rows)
    return max(MIN_STEP_TOKENS, asked)


def uses_v2(options: dict[str, Any]) -> bool:
    """Whether vLLM would run its newer model runner with these options: it decides by model and machine."""
    from vllm.engine.arg_utils import EngineArgs

    given: Any = options
    with contextlib.suppress(Exception):  # whatever it is, vLLM says it again when it starts with them
        return bool(getattr(EngineArgs(**given).create_engine_config(), "use_v2_model_runner", False))
    return False


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


def version() -> str:
    """Name and version of the vLLM that is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm of unknown version"
