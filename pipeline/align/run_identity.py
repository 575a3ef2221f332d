"""Whose run a folder of targets is: align.json holds everything that decides what they say."""

import json
from typing import Any

from xtoken.pipeline.capture.run_identity import read_record
from xtoken.pipeline.project.projection import Projection
from xtoken.pipeline.store.files import Folder
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, content_hash

RUN_FILE = "align.json"


def run_settings(config: AlignConfig, capture: CaptureManifest, projection: Projection) -> dict[str, Any]:
    """Everything that decides what the targets hold."""
    return {
        "capture": content_hash(capture),
        "student": projection.student.hash,
        "w": projection.hash,
        "for": config.losses,
        "unreached": config.unreached,
        "merge": config.merge,
        "tau": config.tau,
        "entries": config.entries,
    }


def claim(root: str, settings: dict[str, Any]) -> None:
    """Record whose run this folder is, or refuse when it is another's.

    Raises:
        XtokenError: it is another's, or the record is damaged.
    """
    folder = Folder(root)
    folder.make("")
    foreign = [name for name in folder.names() if not name.endswith(".tmp")]
    if foreign and not folder.exists(RUN_FILE):
        raise XtokenError(f"{root} holds {foreign[0]} and no {RUN_FILE}: no align run wrote it; give another --out")
    if folder.create(RUN_FILE, json.dumps(settings, indent=1).encode() + b"\n"):
        return
    recorded = read_record(folder, RUN_FILE, needed=any(name != RUN_FILE for name in foreign))
    differing = [name for name in settings if recorded.get(name) != settings[name]]
    if differing:
        listed = ", ".join(
            f"{name}: {_short(recorded.get(name))} there, {_short(settings[name])} now" for name in differing
        )
        raise XtokenError(f"{root} belongs to another align run ({listed}); give another --out, or remove that folder")


def _short(value: Any) -> str:
    text = "+".join(value) if isinstance(value, list) else str(value)
    return text[:12]
