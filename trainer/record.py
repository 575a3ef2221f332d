"""What lies in the folder of a run, checked: whether it is one, and whether its trained model is whole."""

import json
from pathlib import Path
from typing import Any

from xtoken.schemas.errors import XtokenError

RUN, CHECKPOINTS, METRICS = "run.json", "checkpoints", "metrics.jsonl"
_INDEX = "model.safetensors.index.json"


def identity_of(record: Any) -> dict[str, Any] | None:
    """What a run.json says that decides a training run's result; None where it is none's: captures have one, too."""
    identity = record.get("identity") if isinstance(record, dict) else None
    losses = identity.get("loss") if isinstance(identity, dict) else None
    return identity if isinstance(identity, dict) and isinstance(losses, list) and losses else None


def read_lines(path: Path, needs: str, kind: type) -> list[dict[str, Any]]:
    """All whole lines of a JSON lines file; the last may be torn by a crash and is then left out.

    Args:
        path: the file; none is as an empty one.
        needs: what every line holds.
        kind: of what type that is.

    Raises:
        XtokenError: a line is something else than a run writes.
    """
    if not path.exists():
        return []
    lines = []
    for at, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        line = parsed(text)
        if not isinstance(line, dict) or type(line.get(needs)) is not kind:
            raise XtokenError(
                f"{path}, line {at} is {ascii(text.decode(errors='replace'))[:60]}, which no run writes; remove that "
                "line and run the same command again"
            )
        lines.append(line)
    return lines


def lacking(model: Path) -> str | None:
    """The first file that the model of a finished run needs and that is missing or empty; None where it is whole."""
    return next((name for name in ("config.json", *_weights(model)) if not _filled(model / name)), None)


def _weights(model: Path) -> list[str]:
    index = parsed((model / _INDEX).read_bytes()) if _filled(model / _INDEX) else None
    shards = index.get("weight_map") if isinstance(index, dict) else None
    return sorted({*map(str, shards.values())}) if isinstance(shards, dict) and shards else ["model.safetensors"]


def _filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def parsed(text: bytes) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
