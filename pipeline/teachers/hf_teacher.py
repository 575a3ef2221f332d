"""The embedded teacher: transformers on CPU or one GPU.

The body of the model runs once per padded batch; the head runs over blocks of positions, in float32,
so that [B, T, U] never exists. Heads with more to them than scales and a soft cap are recognised when the
model is loaded, by comparison with its own forward pass, and then run whole, one sequence at a time.

Shapes: B batch, T teacher tokens, N positions of a batch that predict a token, H hidden, U teacher vocabulary.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from xtoken.pipeline.teachers import model_source
from xtoken.pipeline.teachers.base import Batch, Question, TeacherRows, check_prompt, entries_asked, stream_batches
from xtoken.pipeline.teachers.draws import Sampler
from xtoken.pipeline.teachers.fast_rows import Reader, open_reader
from xtoken.pipeline.teachers.hf_answers import answers
from xtoken.pipeline.teachers.logit_rows import BLOCK_LOGITS, RowReader, cut, join
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.devices import auto_device
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TeacherInfo

# Largest difference between head blocks and the model's own forward, relative to its largest logit: the same
# products in another order (float32), or a head rounded to half precision. Any missed scale is far beyond.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_PROBE_TOKENS = 8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LogitSource(Protocol):
    """A forward pass in two steps, so that the second can run over blocks of positions."""

    @property
    def path(self) -> str:
        """Name of this way, for the manifest."""
        ...

    @property
    def head_dtype(self) -> str:
        """Precision in which the logits were added up."""
        ...

    @property
    def batches(self) -> bool:
        """Whether more than one sequence may run at a time."""
        ...

    def states(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What the second step needs, [B, T, ...]."""
        ...

    def logits(self, states_N: Tensor) -> Tensor:
        """float32 [N, U], newly allocated."""
        ...


@dataclass(frozen=True)
class HeadBlocks:
    """Hidden states of the body, then the output head, scales and soft cap in float32."""

    body: Any
    head: Any
    scale: float
    soft_cap: float | None
    path = "hf-blocks"
    batches = True

    @property
    def head_dtype(self) -> str:
        """Precision in which the head multiplies and adds up."""
        return "float32" if _is_plain(self.head) else _name(self.head.weight.dtype)

    def states(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Hidden states [B, T, H]."""
        out = self.body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, states_N: Tensor) -> Tensor:
        """float32 [N, U] from hidden states [N, H]."""
        logits_NU = _float32_head(self.head, states_N) if _is_plain(self.head) else self.head(states_N).float()
        if self.scale != 1.0:
            logits_NU.mul_(self.scale)
        if self.soft_cap is not None:
            logits_NU.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits_NU


@dataclass(frozen=True)
class WholeForward:
    """The model's own logits, for heads that ``HeadBlocks`` does not reproduce."""

    model: Any
    path = "hf-forward"
    batches = False

    @property
    def head_dtype(self) -> str:
        """Precision of the model's logits."""
        return _name(self.model.dtype)

    def states(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Logits [B, T, U] in the model's precision."""
        logits: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        return logits

    def logits(self, states_N: Tensor) -> Tensor:
        """The same in float32."""
        return states_N.to(torch.float32, copy=True)


class HfTeacher:
    """A transformers model; see the module."""

    def __init__(
        self,
        source: LogitSource,
        reader: Reader,
        sampler: Sampler | None,
        info: TeacherInfo,
        device: torch.device,
        batch_tokens: int,
        attention: str = "",
        model: Any = None,
    ) -> None:
        self.info = info
        self._model = model
        self.settings: dict[str, str | int | float | bool] = {"batch_tokens": batch_tokens, "attention": attention}
        self._source = source
        self._reader = reader
        self._sampler = sampler
        self._device = device
        self._batch_tokens = batch_tokens if source.batches else 1
        self._block = max(1, BLOCK_LOGITS[device.type] // info.vocab_rows)

    def rows(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
        """Score sequences (see ``xtoken.pipeline.teachers.base.Teacher``).

        Raises:
            XtokenError: a token the model has no row for, logits that are NaN or inf, or not enough memory.
        """
        for ids in batch:
            check_prompt(ids, self.info)
        found: dict[int, TeacherRows] = {}
        try:
            with torch.inference_mode():
                for group in groups([len(ids) for ids in batch], self._batch_tokens):
                    found.update(zip(group, self._group([batch[index] for index in group]), strict=True))
        except torch.OutOfMemoryError as error:
            raise XtokenError(
                f"{self.info.device} ran out of memory in batches of {self._batch_tokens} tokens; "
                "use a smaller --batch-tokens or --max-tokens"
            ) from error
        return [found[index] for index in range(len(batch))]

    def stream(self, batches: Iterator[Batch | None]) -> Iterator[tuple[Hashable, TeacherRows]]:
        """Batch by batch (see ``xtoken.pipeline.teachers.base.Teacher``)."""
        return stream_batches(self, batches)

    def generate(self, questions: Sequence[Question]) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Answer prompts (see ``xtoken.pipeline.teachers.base.Teacher``); which meet follows from their lengths."""
        for question in questions:
            check_prompt(question.ids, self.info)
        sizes = [len(question.ids) + question.tokens for question in questions]
        for group in groups(sizes, self._batch_tokens):
            yield from zip(group, answers(self._model, self._device, [questions[at] for at in group]), strict=True)

    def second_path(self, batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows] | None:
        """None: there is no other way to the same rows."""
        del batch
        return None

    def _group(self, sequences: list[NDArray[np.int32]]) -> list[TeacherRows]:
        lengths = [len(ids) for ids in sequences]
        ids_BT, mask_BT = _pad(sequences, self._device)
        states_BT = self._source.states(ids_BT, mask_BT)
        states_N = torch.cat([states_BT[row, : length - 1] for row, length in enumerate(lengths)])
        target_N = torch.cat([ids_BT[row, 1:length] for row, length in enumerate(lengths)])
        blocks = [slice(start, start + self._block) for start in range(0, len(target_N), self._block)]
        uniform_N = self._uniforms(sequences)
        rows = join(
            [
                self._reader.read(
                    self._source.logits(states_N[block]),
                    target_N[block],
                    None if uniform_N is None else uniform_N[block],
                )
                for block in blocks
            ]
        )
        ends = np.cumsum([length - 1 for length in lengths]).tolist()
        return [cut(rows, start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]

    def _uniforms(self, sequences: list[NDArray[np.int32]]) -> NDArray[np.float64] | None:
        """Numbers of all rows of the sequences, one after the other; None where nothing is sampled."""
        sampler = self._sampler
        return None if sampler is None else np.concatenate([sampler.uniforms(ids) for ids in sequences])


def groups(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of sequences to run together, longest first.

    A group holds at most ``limit`` tokens after padding, or one sequence, and none shorter than half its
    longest: less than half of the work is padding. Which sequences meet follows from the lengths only.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while order:
        longest = lengths[order[0]]
        alike = sum(2 * lengths[index] >= longest for index in order)
        size = min(alike, max(1, limit // longest))
        yield order[:size]
        order = order[size:]


def open_teacher(config: TeacherGroup, codec: CodecGroup, table: TokenTable) -> HfTeacher:
    """Load ``config.teacher`` (see ``xtoken.pipeline.teachers.open_teacher``).

    Raises:
        XtokenError: the request does not fit the model, or the model or device is not there.
    """
    model_config = model_source.load_model_config(config)
    model_source.check_request(config, codec, model_config, table)
    device = _device(config.device)
    model = _load(config, model_config, device)
    source = pick_source(model)
    info = _info(config, model_config, model, source, device)
    space = np.flatnonzero(table.word_starts(codec.space)[: info.vocab_rows])
    space_P, sampler = torch.from_numpy(space).to(device), Sampler.of(codec, table.size)
    asked = RowReader(entries_asked(codec, info.vocab_rows), space_P, tuple(codec.temperatures), sampler)
    reader = open_reader(asked, device, info.vocab_rows) if device.type == "cuda" else asked
    attention = str(getattr(model.config, "_attn_implementation", ""))
    return HfTeacher(source, reader, sampler, info, device, config.batch_on(device.type), attention, model)


def pick_source(model: Any) -> LogitSource:
    """Head blocks where they give the model's own logits on a short prompt, else its whole forward pass."""
    head, body = model.get_output_embeddings(), model.base_model
    whole = WholeForward(model)
    if head is None or body is model:
        return whole
    text = model.config.get_text_config()
    scale = _number(text, "logit_scale", 1.0) * _number(text, "lm_head_multiplier", 1.0)
    scale /= _number(text, "logits_scaling", 1.0)
    cap = getattr(text, "final_logit_softcapping", None)
    blocks = HeadBlocks(body, head, scale, None if cap is None else float(cap))
    return blocks if _agree(blocks, whole, model) else whole


def _agree(blocks: HeadBlocks, whole: WholeForward, model: Any) -> bool:
    size = model.get_input_embeddings().weight.shape[0]
    probe = (torch.arange(1, _PROBE_TOKENS + 1, device=model.device) * 7919 % size)[None]
    with torch.inference_mode():
        expected = whole.states(probe, None)[0].float()
        found = blocks.logits(blocks.states(probe, None)[0])
    if found.shape != expected.shape:
        return False
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) <= TOLERANCE.get(model.dtype, 3e-2) * max(largest, 1e-6)


def _load(config: TeacherGroup, model_config: Any, device: torch.device) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    try:
        with _no_progress_bars():
            model, loading = auto.from_pretrained(
                config.teacher,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=_dtype(config.dtype, device),
                attn_implementation=_attention(model_config),
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise model_source.cannot_load(config, error) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise XtokenError(
            f"teacher {config.teacher!r} lacks {len(missing)} weights of its architecture ({missing[0]}, ...); "
            "they would be random numbers: fetch the model again or give one with all its weights"
        )
    try:
        return model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise XtokenError(
            f"{config.teacher} does not fit {device}; use a smaller --dtype, or another --device"
        ) from error


def _attention(model_config: Any) -> str | None:
    """Eager where attention scores are soft-capped (Gemma 2): scaled_dot_product_attention leaves the cap out."""
    capped = getattr(model_config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else None


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _info(
    config: TeacherGroup, model_config: Any, model: Any, source: LogitSource, device: torch.device
) -> TeacherInfo:
    head = model.get_output_embeddings()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return TeacherInfo(
        model=config.teacher,
        backend="hf",
        revision=model_source.revision(model_config),
        config_hash=model_source.config_hash(model_config),
        weights_hash=model_source.revision(model_config),  # of a folder, its worker says it
        vocab_rows=model_source.vocab_rows(model_config) if head is None else head.weight.shape[0],
        context=model_source.context(model_config),
        dtype=_name(model.dtype),
        head_dtype=source.head_dtype,
        quantization=model_source.quantization(model_config),
        device=name,
        capture_path=source.path,
        engine_version=f"transformers {metadata.version('transformers')}",
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device(auto_device())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise XtokenError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in BLOCK_LOGITS:
        raise XtokenError(f"--device {name!r}: the hf backend runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise XtokenError(
            f"--device {name!r} is not there: torch sees {torch.cuda.device_count()} GPUs; use --device auto"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def _pad(sequences: list[NDArray[np.int32]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ids int64 [B, T], padded on the right, and the mask of real tokens; no mask where nothing was padded.

    In a causal model nothing real sees what stands to its right, and positions count from the left.
    """
    longest = max(len(ids) for ids in sequences)
    ids_BT = np.zeros((len(sequences), longest), np.int64)
    mask_BT = np.zeros((len(sequences), longest), np.int64)
    for row, ids in enumerate(sequences):
        ids_BT[row, : len(ids)] = ids
        mask_BT[row, : len(ids)] = 1
    mask = None if mask_BT.all() else torch.from_numpy(mask_BT).to(device)
    return torch.from_numpy(ids_BT).to(device), mask


def _is_plain(head: Any) -> bool:
    return type(head) is nn.Linear and head.weight.is_floating_point()


def _float32_head(head: nn.Linear, states_NH: Tensor) -> Tensor:
    """Head in float32: rounding logits to half precision would make most rows full of ties."""
    if head.weight.dtype == torch.float32 or not head.weight.is_cuda:
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(states_NH.float(), head.weight.float(), bias)
    # Half-precision factors, float32 sums and result, without a float32 copy of the weights.
    logits_NU = torch.mm(states_NH.to(head.weight.dtype), head.weight.t(), out_dtype=torch.float32)
    return logits_NU if head.bias is None else logits_NU.add_(head.bias.float())


def _number(config: Any, name: str, default: float) -> float:
    found = getattr(config, name, None)
    return default if found is None else float(found)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
