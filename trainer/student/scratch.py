"""A student from a config.json and a seed."""

import json
from pathlib import Path
from typing import Any

import torch

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo

# What published config.json files hold beside the architecture, by names that transformers reads or no longer needs.
_BESIDE = {"rope_theta", "rope_scaling", "torch_dtype", "unk_token_id", "use_return_dict", "tokenizer_class"}


def build_student(path: Path, tokenizer: TokenizerInfo, seed: int, trust_remote_code: bool) -> Any:
    """The architecture of a config.json with random weights in float32, on the CPU; the same bytes for the same seed.

    Its BOS and EOS are the tokenizer's. A padding id that is also a token of text is dropped: torch would never train
    its embedding. Ids beyond the tokenizer are suppressed when the model generates, since nothing trains them.

    Raises:
        XtokenError: the file is missing or no JSON object, names no architecture or fields it does not have, or
            describes a model that cannot be built or is too narrow for the tokenizer.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(path, trust_remote_code)
    _fit(config, path, tokenizer)
    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever an architecture raises on sizes that do not go together
            raise XtokenError(f"{path} describes no model that can be built: {_reason(error)}; correct it") from error
    unused = list(range(tokenizer.size, config.get_text_config().vocab_size))
    if unused:
        model.generation_config.suppress_tokens = unused
    return model


def read_config(path: Path, trust_remote_code: bool) -> Any:
    """The transformers configuration in ``path``.

    Raises:
        XtokenError: see ``build_student``.
    """
    fields = _read(path)
    if "auto_map" in fields:
        return _custom_config(path, trust_remote_code)
    if not isinstance(fields.get("model_type"), str):
        raise XtokenError(f"{path} has no model_type, which names the architecture; add one, such as 'llama'")
    return _known_config(path, fields)


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise XtokenError(f"{path} cannot be read ({error.strerror}); give the path of a config.json") from error
    except ValueError as error:
        raise XtokenError(f"{path} is not JSON ({error}); correct it") from error
    if not isinstance(fields, dict):
        raise XtokenError(f"{path} is JSON, but not an object; give a model's config.json")
    return fields


def _custom_config(path: Path, trust_remote_code: bool) -> Any:
    """A configuration whose class lies in a Python file beside it."""
    from transformers import AutoConfig

    if not trust_remote_code:
        raise XtokenError(f"{path} needs Python code that lies beside it (auto_map); allow it: --trust-remote-code")
    if path.name != "config.json":
        raise XtokenError(f"{path} needs code that lies beside it, which is found by config.json only; name it so")
    try:
        return AutoConfig.from_pretrained(str(path.parent), trust_remote_code=True)
    except Exception as error:  # the code is not ours
        raise XtokenError(f"{path} cannot be loaded with its code: {_reason(error)}; correct it") from error


def _known_config(path: Path, fields: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    known: Any = CONFIG_MAPPING
    name = fields["model_type"]
    if name not in known:
        raise XtokenError(f"{path}: transformers knows no model_type {name!r}; correct it, or update transformers")
    kind = known[name]
    _check_fields(path, kind, fields)
    try:
        return kind.from_dict({key: value for key, value in fields.items() if key != "model_type"})
    except Exception as error:  # validation errors of transformers share no base
        raise XtokenError(f"{path}: {_reason(error)}; correct it") from error


def _check_fields(path: Path, kind: Any, fields: dict[str, Any]) -> None:
    """transformers keeps a field it does not know and builds the default instead: a typo would train another model."""
    known = set(kind().to_dict()) | set(kind.attribute_map) | set(getattr(kind, "__dataclass_fields__", ())) | _BESIDE
    unknown = sorted(key for key in fields if key not in known and not key.startswith("_"))
    if unknown:
        raise XtokenError(
            f"{path} sets {', '.join(unknown)}, which {kind.__name__} does not have; correct the name or remove it"
        )


def _fit(config: Any, path: Path, tokenizer: TokenizerInfo) -> None:
    text = config.get_text_config()
    if text.vocab_size < tokenizer.size:
        raise XtokenError(
            f"{path} has vocab_size {text.vocab_size}, but tokenizer {tokenizer.name!r} has {tokenizer.size} tokens; "
            f"set vocab_size to {tokenizer.size} or more"
        )
    for part in {id(part): part for part in (config, text)}.values():
        part.bos_token_id, part.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        pad = getattr(part, "pad_token_id", None)
        part.pad_token_id = pad if pad is not None and tokenizer.size <= pad < text.vocab_size else None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
