"""What is copied where: parts, side files and a manifest, and whether a destination holds the same artifact."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xtoken.pipeline.store.files import Folder
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import AnyManifest, Part, provenance

CLAIM_FILE = "share.json"
_SHOWN = 60

Rewrite = Callable[[str, Part, str], Part | None]


@dataclass(frozen=True)
class PartJob:
    """One part to be copied.

    Attributes:
        source: artifact it comes from.
        part: its record there.
        index: its number at the destination.
        rewrite: makes the file of a subset from (local copy, record, local path for the result) and describes it;
            None when no sample is left. Left out: the part stays as it is.
    """

    source: Folder
    part: Part
    index: int
    rewrite: Rewrite | None = None

    @property
    def wanted(self) -> Part | None:
        """The record at the destination, where it is known before."""
        return None if self.rewrite else self.part.model_copy(update={"index": self.index})


@dataclass(frozen=True)
class SideFile:
    """A file beside the parts: copied from ``source``, or written from ``data``."""

    name: str
    source: Folder | None = None
    sha256: str | None = None
    data: bytes = b""


@dataclass(frozen=True)
class Shipment:
    """An artifact as its destination shall hold it.

    Attributes:
        verb: push, pull or merge; shown beside the progress.
        claim: what says in words of the user which copy this is.
        parts: in order of their new numbers.
        files: beside the parts.
        manifest: without parts, which are filled in.
        verbatim: the manifest's bytes where they are copied unchanged.
        card: makes the files that describe the artifact from the finished manifest, once everything else is there.
    """

    verb: str
    claim: dict[str, Any]
    parts: Sequence[PartJob]
    files: Sequence[SideFile]
    manifest: AnyManifest
    verbatim: bytes | None = None
    card: Callable[[AnyManifest], Sequence[SideFile]] | None = None


def differences(there: AnyManifest, shipment: Shipment) -> list[str]:
    """How a finished artifact differs from a shipment, whoever wrote it and when; field by field."""
    wanted = shipment.manifest
    skipped = {*provenance(), "parts"}
    different = differing(there.model_dump(exclude=skipped), wanted.model_dump(exclude=skipped))
    if not different and all(job.rewrite is None for job in shipment.parts):
        mine = {job.index: job.part.sha256 for job in shipment.parts}
        theirs = {part.index: part.sha256 for part in there.parts}
        other = sorted(index for index in {*mine, *theirs} if mine.get(index) != theirs.get(index))
        if other:
            different.append(f"{len(other)} parts, the first is part {other[0]}")
    return different


def differing(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Names of what differs, with both values."""
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return [f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} here" for name in names]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def refuse_other(root: str, different: list[str]) -> None:
    """Raise XtokenError when a destination differs from what is to be there."""
    if different:
        raise XtokenError(
            f"{root} holds another artifact ({'; '.join(different)}); give a new folder as destination, or remove that"
        )


def read_claim(folder: Folder) -> dict[str, Any]:
    """Whose copy an unfinished destination is.

    Raises:
        XtokenError: the file that says it is damaged.
    """
    try:
        claim = json.loads(folder.read(CLAIM_FILE))
        if isinstance(claim, dict):
            return claim
    except ValueError:
        pass
    raise XtokenError(f"{folder.url(CLAIM_FILE)} is damaged; remove {folder.root} and run the same command again")
