"""Whose run a folder of targets is: align.json holds everything that decides what they say."""

from typing import Any

from xtoken.pipeline.align.losses import builders
from xtoken.pipeline.capture.run_identity import create_or_compare
from xtoken.pipeline.project.projection import Projection
from xtoken.pipeline.project.stops import StopPair
from xtoken.pipeline.store.files import Folder
from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.identity import Difference, defaults, identity
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, content_hash

RUN_FILE = "align.json"
_HASH = 64  # characters
_STOPS = ("the student's stop token", "the teacher's stop token", "the teacher's eos")


def run_settings(
    config: AlignConfig,
    capture: CaptureManifest,
    projection: Projection,
    chat: ChatInfo | None = None,
    stops: StopPair | None = None,
) -> dict[str, Any]:
    """Everything that decides what the targets hold.

    Args:
        config: the run's.
        capture: what is aligned.
        projection: W.
        chat, stops: of conversations, the student's side, and what ends an answer on both.
    """
    settings = {
        "capture": content_hash(capture),
        "student": projection.student.hash,
        "w": projection.hash,
        "for": config.losses,
        "unreached": config.unreached,
        "merge": config.merge,
        "tau": config.tau,
        "entries": config.entries,
    }
    if revisions := [f"{loss.name}-{loss.revision}" for loss in builders(config.losses) if loss.revision]:
        settings["revisions"] = revisions
    others = identity(config)
    if chat is None:  # texts go through no template: nothing is recorded of one
        del others["template_arg"]
    else:
        settings["template"] = chat.template
        settings["stops"] = None if stops is None else [stops.student, stops.teacher, stops.teacher_eos]
    return settings | {name: value for name, value in others.items() if name not in settings}


def claim(root: str, settings: dict[str, Any], model: type[AlignConfig] = AlignConfig) -> None:
    """Record whose run this folder is, or refuse when it is another's.

    Args:
        root: the folder.
        settings: of this run, see ``run_settings``.
        model: the configuration whose defaults an older record means by its silence.

    Raises:
        XtokenError: it is another's, or the record is damaged.
    """
    folder = Folder(root)
    folder.make("")
    foreign = [name for name in folder.names() if not name.endswith(".tmp")]
    if foreign and not folder.exists(RUN_FILE):
        raise XtokenError(f"{root} holds {foreign[0]} and no {RUN_FILE}: no align run wrote it; give another --out")
    needed = any(name != RUN_FILE for name in foreign)
    silent = {**defaults(model), "revisions": []}
    differ = create_or_compare(folder, RUN_FILE, settings, needed=needed, absent=silent)
    if differ:
        listed = "; ".join(said for one in differ for said in _in_words(one))
        raise XtokenError(f"{root} belongs to another align run ({listed}); give another --out, or remove that folder")


def _in_words(differ: Difference) -> list[str]:
    """What differs; of the tokens that end an answer, each by itself."""
    name, there, now = differ
    if name != "stops":
        return [f"{name}: {_short(there)} there, {_short(now)} now"]
    none = [None] * len(_STOPS)
    pairs = zip(_STOPS, there or none, now or none, strict=False)
    return [f"{named}: {_short(left)} there, {_short(right)} now" for named, left, right in pairs if left != right]


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return text[:12] if len(text) == _HASH else text
