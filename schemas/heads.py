"""What a model's config.json says of its head and weights, and what a tokenizer asks of it: known without a model."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtoken.schemas.errors import XtokenError

# Tokens of these roles stand in no sample: a head may lack them.
ABSENT_ROLES = ("pad", "unk", "special", "hole")
_CONFIG = "config.json"
_TEXT = ("text_config", "llm_config", "language_config")  # where models of text and images keep their text part


def needed_rows(roles: Sequence[str | None]) -> int:
    """Least width of an output head: one more than the highest id that text, BOS or EOS can have.

    Args:
        roles: of each token id, None for text.
    """
    return max((i for i, role in enumerate(roles) if role not in ABSENT_ROLES), default=-1) + 1


def stated_rows(source: str, revision: str | None = None) -> int | None:
    """Width of the head that config.json gives the model at ``source``; None where there is none or it does not say.

    Nothing is fetched: of a hub id, what is in the cache counts.

    Args:
        source: a folder, a file in it, a config.json, or a hub id.
    """
    sizes = [part.get("vocab_size") for part in _parts(_config_file(source, revision))]
    found = [size for size in sizes if isinstance(size, int) and size > 0]
    return found[-1] if found else None  # the text part's own


def stated_dtype(source: str) -> str | None:
    """The dtype that config.json gives the weights at ``source``, such as ``bfloat16``; None where it does not say.

    Args:
        source: a folder, a config.json whatever it is called, or a hub id, of which what is in the cache counts.
    """
    path = Path(source).expanduser()
    parts = _parts(path if path.is_file() else _config_file(source, None))
    names = [part.get(key) for part in parts for key in ("torch_dtype", "dtype")]  # the first is the older name
    found = [name.removeprefix("torch.") for name in names if isinstance(name, str)]
    return found[-1] if found else None


def _parts(path: Path | None) -> list[dict[str, Any]]:
    """A config.json, and its part for text where there is one; nothing where it cannot be read."""
    try:
        fields = json.loads(path.read_bytes()) if path is not None else None
    except (OSError, ValueError):
        return []  # whoever loads the model says what is wrong with it
    parts = [fields, *(fields.get(name) for name in _TEXT)] if isinstance(fields, dict) else []
    return [part for part in parts if isinstance(part, dict)]


def _config_file(source: str, revision: str | None) -> Path | None:
    path = Path(source).expanduser()
    if path.is_dir():
        return path / _CONFIG
    if path.is_file():
        return path.with_name(_CONFIG)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found: Any = try_to_load_from_cache(source, _CONFIG, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str | os.PathLike) else None


def refuse_narrow_head(source: str, rows: int | None, roles: Sequence[str | None], pieces: Sequence[bytes]) -> None:
    """Raise XtokenError where a model's head lacks tokens that text is made of.

    Args:
        source: the model, as the user named it.
        rows: of its head; None where that is not known yet.
        roles, pieces: role and bytes of each token id of its tokenizer.
    """
    needed = needed_rows(roles)
    if rows is None or rows >= needed:
        return
    beyond = [i for i in range(rows, needed) if roles[i] not in ABSENT_ROLES]
    shown = pieces[beyond[0]].decode("utf-8", "backslashreplace") or roles[beyond[0]]
    raise XtokenError(
        f"{source} predicts {rows} tokens, but its tokenizer's ids go up to {needed - 1}: {len(beyond)} tokens of text "
        f"lie beyond (the first is {shown!r}, {beyond[0]}); resize the model's embeddings or give the tokenizer that "
        "belongs to it"
    )
