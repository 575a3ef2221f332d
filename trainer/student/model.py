"""The student: loaded, built from random weights, made ready to train, and saved as a Hugging Face folder."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xtoken.schemas.configs.train import StudentGroup
from xtoken.schemas.devices import auto_device
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.heads import stated_dtype
from xtoken.schemas.io.atomic import whole_folder
from xtoken.schemas.io.hub_files import require_known
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.student.expansion import expanded, inner_config, is_expanded
from xtoken.trainer.student.scratch import build_student
from xtoken.trainer.student.tokenizer_files import CHAT_TEMPLATE, copy_tokenizer
from xtoken.trainer.student.writable import mend_settings

_REASON = 300  # characters of a library's message
_SAVED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one.

    Raises:
        XtokenError: the device does not exist here, or see ``auto_device``.
    """
    if name == "auto":
        return torch.device(auto_device())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise XtokenError(f"device {name!r} cannot be used here ({reason}); use --device cpu or auto") from error
    return device


def pick_autocast(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None; ``auto`` is bfloat16 on GPU and none elsewhere."""
    wanted = name == "bfloat16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if wanted else None


def pick_save_dtype(student: StudentGroup) -> torch.dtype:
    """Of the trained model's weights; ``auto`` is what the student's config.json says, float32 where it says nothing.

    A dtype that training does not end in (float8, float64) counts as nothing.
    """
    name = stated_dtype(student.source) if student.save_dtype == "auto" else student.save_dtype
    return _SAVED.get(name or "", torch.float32)


def open_student(student: StudentGroup, device: torch.device, tokenizer: TokenizerInfo, seed: int) -> Any:
    """The model that ``student`` names, in float32 on ``device``: loaded, or random by ``seed``.

    The caller's random state stays as it is.

    Raises:
        XtokenError: it cannot be loaded, is quantised, or config.json does not describe a model for this tokenizer.
    """
    if student.from_scratch is None:
        model = load_student(str(student.student), device, student.trust_remote_code)
        refuse_packed(model, student.source)
        return model
    return build_student(Path(student.from_scratch), tokenizer, seed, student.trust_remote_code).to(device)


def refuse_packed(model: Any, source: str) -> None:
    """Raise XtokenError for a model whose weights are quantised."""
    packed = getattr(model, "hf_quantizer", None)
    if packed is not None:
        method = getattr(packed.quantization_config.quant_method, "value", packed.quantization_config.quant_method)
        raise XtokenError(
            f"the model {source!r} is quantised ({method}), and only plain weights can be changed; give the model that "
            "it was made from"
        )


def load_student(
    source: str, device: torch.device, trust_remote_code: bool, dtype: torch.dtype | str = torch.float32
) -> Any:
    """A causal language model, in float32 or ``dtype``; ``auto`` is the one that its files are in.

    Raises:
        XtokenError: nothing loadable at ``source``.
    """
    from transformers import AutoModelForCausalLM

    if not os.path.isdir(source) and os.path.exists(source):
        raise XtokenError(f"{source} is a file; a model is a folder or a Hugging Face id")
    auto: Any = AutoModelForCausalLM
    # the folder of a model with expanded inputs names a type that transformers does not know
    inside = {"config": inner_config(source)} if is_expanded(source) else {}
    try:
        with _no_progress_bars():
            options = inside | straight_to(device)
            model, loaded = auto.from_pretrained(
                source, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **options
            )
    except Exception as error:  # what an architecture raises on settings that do not go together shares no base
        reason = " ".join(str(error).split())[:_REASON] or type(error).__name__
        raise XtokenError(
            f"the model {source!r} cannot be loaded: {reason}; give a folder or a reachable id"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise XtokenError(f"{source} lacks weights of its architecture, such as {missing[0]}; fetch the model again")
    # transformers goes on without it, and the trained model would stop at other tokens
    require_known(source, "generation_config.json", getattr(model.config, "_commit_hash", None))
    return (expanded(model, source) if inside else model).to(device)


def straight_to(device: torch.device) -> dict[str, Any]:
    """Options of ``from_pretrained`` that read each tensor to a GPU, with no copy of the model in the host's memory.

    Under torchrun every rank would have one. It takes accelerate, which comes with peft; without it the whole model is
    read first and then moved.
    """
    if device.type == "cpu" or find_spec("accelerate") is None:
        return {}
    return {"device_map": {"": device}}


def head_width(model: Any) -> int:
    """Tokens the model predicts, padding of its head included."""
    return int(model.get_output_embeddings().weight.shape[0])


def vocabulary_parameters(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """What a model has by token, by name: embedding, head and its bias; a head that is the embedding once."""
    parts = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    inside = {id(parameter) for part in parts for parameter in part.parameters(recurse=False)}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in inside]


def check_width(model: Any, needed: int, source: str) -> None:
    """The output head must cover the ids that samples can hold.

    Raises:
        XtokenError: it does not.
    """
    width = head_width(model)
    if width < needed:
        raise XtokenError(
            f"{source} predicts {width} tokens, but its tokenizer's ids go up to {needed - 1}; "
            "resize the model's embeddings or give the tokenizer that belongs to it"
        )


def check_context(model: Any, inputs: int, source: str) -> None:
    """Samples must fit the model's context.

    Raises:
        XtokenError: they do not.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and inputs > limit:
        raise XtokenError(
            f"max_tokens={inputs} is longer than the context of {source}, {limit}; use --max-tokens {limit}"
        )


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The model's repeated blocks: its list of modules that holds most parameters.

    Raises:
        XtokenError: it has no such list.
    """
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    if not lists:
        raise XtokenError(
            f"{type(model).__name__} has no list of layers; it can neither be compiled nor sharded by them"
        )
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def prepare(model: Any, activation_checkpointing: bool, compile: bool) -> Any:  # noqa: A002
    """Make ``model`` ready to train, in place; names of parameters stay.

    Call it after ``add_adapters`` and before the model is wrapped or sharded.

    Raises:
        XtokenError: the model cannot recompute activations, or nothing can be compiled here.
    """
    model.train()
    if activation_checkpointing:
        _recompute_activations(model)
    if compile:
        device = next(model.parameters()).device
        if device.type != "meta":  # an outline's first rank has looked
            _check_compiler(device)
        for layer in decoder_layers(model):
            layer.compile(dynamic=True)
    return model


def _recompute_activations(model: Any) -> None:
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise XtokenError(
            f"{type(model).__name__} cannot recompute its activations; leave --activation-checkpointing out"
        ) from error


def _check_compiler(device: torch.device) -> None:
    """Compile something small: what is missing shows here, not deep in the first step."""
    try:
        torch.compile(torch.nn.Softplus())(torch.ones(8, device=device))
    except Exception as error:  # the compiler's errors share no base
        needs = "a C++ compiler such as g++" if device.type == "cpu" else "Triton and a C compiler"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise XtokenError(
            f"--compile does not work here ({reason}); it needs {needs}: install it, or leave --compile out"
        ) from error


def rehearse_save(model: Any, tokenizer: str, out: Path, template: str | None = None) -> Path:
    """Write all that ``save_student`` will write but the weights, to see before the first step that it can be.

    Args:
        model: after ``mend_settings``.
        tokenizer: as for ``save_student``.
        out: a folder to write into; what is there is deleted.
        template: file with the chat template that the model will have instead of its tokenizer's.

    Returns:
        The folder of the tokenizer's files, which ``save_student`` takes: the source may be gone by then.

    Raises:
        XtokenError: transformers refuses to write the model's settings, or files of the tokenizer cannot be copied.
    """
    shutil.rmtree(out, ignore_errors=True)
    files = out / "tokenizer"
    files.mkdir(parents=True)
    save_pretrained(model, out / "model", {})
    try:
        copy_tokenizer(tokenizer, files)
        if template is not None:
            shutil.copyfile(Path(template).expanduser(), files / CHAT_TEMPLATE)
    except OSError as error:
        raise XtokenError(
            f"the files of the tokenizer {tokenizer!r} cannot be copied ({error}), and the trained model needs them; "
            "make them readable"
        ) from error
    return files


def end_answers_with(model: Any, stop: int | None) -> None:
    """Have generation end at the token with which conversations end an answer, besides those that end it already."""
    settings = getattr(model, "generation_config", None)
    if stop is None or settings is None:
        return
    known = settings.eos_token_id
    ends = known if isinstance(known, list) else [known] if known is not None else []
    if stop not in ends:
        settings.eos_token_id = [*ends, stop]


def save_student(
    model: Any,
    tokenizer: str | Path,
    out: Path,
    state: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``model`` and the files of ``tokenizer`` as a Hugging Face folder, whole or not at all.

    Args:
        model: what ``open_student`` returned.
        tokenizer: id, folder, tokenizer.json or ``bytes``, for which the files are made; or what ``rehearse_save``
            returned.
        out: the folder.
        state: its weights by name, whole and under the names of the plain model; its own when left out. Sharded models
            and models with adapters need it (see ``adapters.merged``).
        dtype: of ``state``, where it is not that of the model; see ``rounded``.

    Raises:
        XtokenError: transformers refuses.
        OSError: the disk does.
    """
    mend_settings(model)
    with whole_folder(out) as temporary:
        save_pretrained(model, temporary, state)
        if dtype is not None:
            _state_dtype(temporary / "config.json", dtype)
        if isinstance(tokenizer, Path):
            shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        else:
            copy_tokenizer(tokenizer, temporary)
        readable_like(temporary / "config.json", temporary)


def rounded(model: Any, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights in the dtype that they are saved in; buffers, and what the architecture wants in float32, stay."""
    exact = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    buffers = {name for name, _ in model.named_buffers()}
    stay = {name for name in state if name in buffers or any(part in name.split(".") for part in exact)}
    return {name: one if name in stay or not one.is_floating_point() else one.to(dtype) for name, one in state.items()}


def _state_dtype(path: Path, dtype: torch.dtype) -> None:
    """Have config.json name it: transformers wrote the dtype that the model was trained in, and loads what it reads."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    for part in (fields, *(one for one in fields.values() if isinstance(one, dict) and "dtype" in one)):
        part["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_pretrained(model: Any, folder: Path, state: Mapping[str, torch.Tensor] | None) -> None:
    """transformers' own, whose refusals are named; ``state`` as for ``save_student``, an empty one writes no weights.

    Raises:
        XtokenError, OSError: as ``save_student``.
    """
    try:
        with _no_progress_bars():
            model.save_pretrained(folder, state_dict=None if state is None else dict(state))
    except OSError:
        raise
    except Exception as error:  # what transformers refuses to write shares no base
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors raises no OSError of a full disk
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        reason = " ".join(str(error).split())[:_REASON] or type(error).__name__
        raise XtokenError(
            f"transformers refuses to write this {type(model).__name__} ({reason}); correct what it names in the "
            "student's config.json or generation_config.json"
        ) from error


def readable_like(example: Path, folder: Path) -> None:
    """Give the weights in ``folder`` the permissions of ``example``: safetensors lets nobody else read its files."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(example, path)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The command line shows its own progress."""
    import transformers

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
