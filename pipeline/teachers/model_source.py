"""Which model a teacher is: its configuration, limits and hashes, known before any weights are loaded."""

import json
import os
from typing import Any

from transformers import AutoConfig

from xtoken.pipeline.teachers.base import refuse_k, shows_bos
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.capture import CodecGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import digest

NO_LIMIT = 2**31 - 1  # context of a model that states none
_SAYS_NOTHING_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def load_model_config(config: TeacherGroup) -> Any:
    """The transformers configuration of ``config.teacher``.

    Raises:
        XtokenError: no such folder or hub model, or it needs code that was not allowed.
    """
    name = config.teacher
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not os.path.isdir(name):
        raise XtokenError(f"teacher folder {name} does not exist; give a Hugging Face folder or hub id")
    try:
        return AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise cannot_load(config, error) from error


_WAY_OUT = "Give a folder with config.json and safetensors weights, or a hub id that is in the cache or reachable."


def cannot_load(config: TeacherGroup, error: Exception, way_out: str = _WAY_OUT) -> XtokenError:
    """The error to raise where loading ``config.teacher`` failed with ``error``."""
    what = f"teacher {config.teacher!r}" + (f" at revision {config.revision!r}" if config.revision else "")
    if "trust_remote_code" in str(error):
        return XtokenError(f"{what} carries its own code; read it, then allow it with --trust-remote-code")
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return XtokenError(f"{what} cannot be loaded: {reason}\n{way_out}")


def check_request(
    config: TeacherGroup, codec: CodecGroup, model_config: Any, table: TokenTable, *, spare: int = 0
) -> None:
    """Refuse what the model cannot give; ``spare`` tokens of context are the engine's own.

    Raises:
        XtokenError: k is larger than the vocabulary, or a sample does not fit the context.
    """
    width = vocab_rows(model_config)
    refuse_k(codec, width, f"the {width} rows of {config.teacher}")
    room = context(model_config) - int(shows_bos(config, table.info)) - spare
    if codec.max_tokens > room:
        raise XtokenError(
            f"--max-tokens {codec.max_tokens} does not fit {config.teacher}: its context of {context(model_config)} "
            f"tokens leaves room for {room}; use --max-tokens {room} or less"
        )


def vocab_rows(model_config: Any) -> int:
    """Width of the output head, as configured."""
    return int(model_config.get_text_config().vocab_size)


def context(model_config: Any) -> int:
    """Tokens that fit the model's context."""
    return int(getattr(model_config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT)


def quantization(model_config: Any) -> str | None:
    """Name of the weights' quantization method."""
    found = getattr(model_config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def config_hash(model_config: Any) -> str:
    """sha256 of the configuration, without names and library versions."""
    values: dict[str, Any] = json.loads(model_config.to_json_string(use_diff=True))
    return digest({key: value for key, value in values.items() if key not in _SAYS_NOTHING_OF_THE_MODEL})


def revision(model_config: Any) -> str | None:
    """Commit of a hub model; None for a folder."""
    found = getattr(model_config, "_commit_hash", None)
    return None if found is None else str(found)
