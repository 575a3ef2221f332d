"""Loading the student and saving the result, both as Hugging Face folders."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from schemas.errors import XtokenError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one.

    Raises:
        XtokenError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def load_student(source: str, device: torch.device, trust_remote_code: bool) -> Any:
    """A causal language model in float32.

    Raises:
        XtokenError: nothing loadable at ``source``.
    """
    from transformers import AutoModelForCausalLM

    if not os.path.isdir(source) and os.path.exists(source):
        raise XtokenError(f"{source} is a file; a model is a folder or a Hugging Face id")
    auto: Any = AutoModelForCausalLM
    try:
        with _no_progress_bars():
            model, loaded = auto.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise XtokenError(
            f"the model {source!r} cannot be loaded: {reason}; give a folder or a reachable id"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise XtokenError(f"{source} lacks weights of its architecture, such as {missing[0]}; fetch the model again")
    return model.to(device)


def head_width(model: Any) -> int:
    """Tokens the model predicts, padding of its head included."""
    return int(model.get_output_embeddings().weight.shape[0])


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


def save_student(model: Any, source: str, out: Path) -> None:
    """Write ``model`` and the tokenizer files of ``source`` as a Hugging Face folder, whole or not at all."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with _no_progress_bars():
        model.save_pretrained(temporary)
    folder = _tokenizer_folder(source)
    for name in TOKENIZER_FILES:
        if folder is not None and (folder / name).is_file():
            shutil.copyfile(folder / name, temporary / name)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


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


def _tokenizer_folder(source: str) -> Path | None:
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=list(TOKENIZER_FILES)))


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
