"""Several target folders as one set of samples: joined where they hold the same sample, kept apart where not.

Two folders hold the same sample when its id, the student's tokens and, of conversations, what of them is taught are
equal. The first folder that holds a sample owns it; the others are looked up by key (16 bytes per sample), so nothing
but row groups in use is in memory.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.errors import XtokenError
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.samples import Stored
from xtoken.trainer.data.targets import GroupRef, RowGroup, Targets, share_cache

_NAMED = {"template": "chat template", "learn": "list of kinds that are taught", "stop_token": "stop token"}


@dataclass(frozen=True)
class OwnedGroup:
    """The samples of a row group that its folder owns: ``rows`` of row group number ``number``."""

    source: int
    number: int
    ref: GroupRef
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class _Index:
    """Keys of a folder's samples in file order, and sorted for lookup."""

    keys: NDArray[np.uint64]
    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Row numbers in the folder, -1 = not there."""
        at = np.searchsorted(self.keys, keys, sorter=self.order)
        row = self.order[np.minimum(at, len(self.order) - 1)]
        return np.where(self.keys[row] == keys, row, -1)

    def place(self, row: int) -> tuple[int, int]:
        """Row group number and row within it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, row - int(self.starts[number])


class Sources:
    """Target folders joined by sample.

    Attributes:
        groups: every sample once, by the row group that owns it.
        samples: how many there are.
        held: how many each folder holds.
        shared: how many all folders hold.
    """

    def __init__(self, folders: Sequence[Targets]) -> None:
        self.folders = list(folders)
        share_cache(folders)
        # One folder needs no join: nothing is read before it is used.
        self._indices = [_index(folder) for folder in folders] if len(folders) > 1 else []
        self.groups = [group for source in range(len(folders)) for group in self._owned(source)]
        self.samples = sum(len(group.rows) for group in self.groups)
        self.held = [folder.samples for folder in folders]
        self.shared = self._shared()

    def _owned(self, source: int) -> Iterator[OwnedGroup]:
        refs = self.folders[source].groups
        every = np.arange(max((ref.rows for ref in refs), default=0))  # shared: there may be millions of row groups
        for number, ref in enumerate(refs):
            rows = every[: ref.rows]
            for earlier in self._indices[:source]:
                rows = rows[earlier.find(self._keys(source, number)[rows]) < 0]
            yield OwnedGroup(source, number, ref, rows)

    def _keys(self, source: int, number: int) -> NDArray[np.uint64]:
        start = int(self._indices[source].starts[number])
        return self._indices[source].keys[start : start + self.folders[source].groups[number].rows]

    def _shared(self) -> int:
        if not self._indices:
            return self.samples
        everywhere = np.ones(len(self._indices[0].keys), np.bool_)
        for index in self._indices[1:]:
            everywhere &= index.find(self._indices[0].keys) >= 0
        return int(everywhere.sum())

    def tokens(self, group: OwnedGroup) -> int:
        """About how many tokens the group's samples have, by the mean of its part."""
        part = self.folders[group.source].part(group.ref.part)
        return part.tokens * len(group.rows) // max(1, part.samples)

    def read(self, group: OwnedGroup, layout: Layout) -> Iterator[list[Stored | None]]:
        """For each owned sample, where every folder stores it; decoded columns are those the layout asks for."""
        decoded = self.folders[group.source].read(group.ref, layout.columns(group.source))
        stored: list[dict[int, Stored]] = [{} for _ in self.folders]
        stored[group.source] = {row: (decoded, row) for row in group.rows.tolist()}
        for source in range(group.source + 1, len(self.folders)):
            stored[source] = self._joined(source, group, layout)
        for row in group.rows.tolist():
            yield [rows.get(row) for rows in stored]

    def _joined(self, source: int, group: OwnedGroup, layout: Layout) -> dict[int, Stored]:
        """Rows of ``group`` that ``source`` holds too."""
        index, opened, joined = self._indices[source], dict[int, RowGroup](), dict[int, Stored]()
        matches = index.find(self._keys(group.source, group.number)[group.rows])
        for row, match in zip(group.rows.tolist(), matches.tolist(), strict=True):
            if match >= 0:
                number, at = index.place(match)
                if number not in opened:
                    folder = self.folders[source]
                    opened[number] = folder.read(folder.groups[number], layout.columns(source))
                joined[row] = (opened[number], at)
        return joined


def refuse_unlike(folders: Sequence[Targets]) -> None:
    """Refuse folders whose samples cannot stand in one run.

    Raises:
        XtokenError: text and conversations, or conversations that the student's side wrote in another way.
    """
    first, *others = folders
    for other in others:
        one, two = first.manifest.chat, other.manifest.chat
        if _holds(one) != _holds(two):
            chats, texts = (first, other) if one is not None else (other, first)
            raise XtokenError(
                f"{chats.root} holds {_holds(chats.manifest.chat)} and {texts.root} {_holds(texts.manifest.chat)}, and "
                "one run learns from either; train on one after the other"
            )
        for name in ChatInfo.model_fields if one is not None else ():
            ours, theirs = getattr(one, name), getattr(two, name)
            if ours != theirs:
                raise XtokenError(
                    f"{first.root} and {other.root} were written with another {_NAMED.get(name, name)} for the "
                    f"student ({str(ours)[:40]!r} and {str(theirs)[:40]!r}), so that their samples differ; align "
                    "both with the same template, date and kinds of spans that are taught"
                )


def _holds(chat: ChatInfo | None) -> str:
    if chat is None:
        return "plain text"
    return "token ids" if chat.template is None else "conversations"


def _index(folder: Targets) -> _Index:
    keys, chat = np.zeros(folder.samples, np.uint64), folder.manifest.chat is not None
    starts = np.cumsum([0, *(ref.rows for ref in folder.groups)])[:-1].astype(np.int64)
    for start, ref in zip(starts.tolist(), folder.groups, strict=True):
        group = folder.read(ref, ("student_ids", "learn") if chat else ("student_ids",))
        for row, sample_id in enumerate(group.sample_ids):
            data = sample_id.encode() + b"\0" + group.values("student_ids", row).astype("<i4").tobytes()
            data += np.packbits(group.values("learn", row)).tobytes() if chat else b""
            keys[start + row] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return _Index(keys, np.argsort(keys, kind="stable"), starts)
