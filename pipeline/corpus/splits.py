"""Which files of a folder hold documents: not those that only lie beside the data, nor those of another split.

A split is told by the names that Hugging Face's ``datasets`` goes by: a folder or file that has the word train, test,
valid or one like them in its name, between separators. Files of no such name count as train.
"""

import posixpath
import re
from collections.abc import Sequence

from xtoken.schemas.configs.capture import ALL, ONLY, TRAIN, split_named
from xtoken.schemas.errors import XtokenError

_TEXT = (".txt", ".md")
_SEPARATORS = re.compile(r"[-._ 0-9]+")
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|contributing|changelog|code_of_conduct)([-_]\w+)*(\.\w\w)?(\.(md|txt|rst|html))?",
    re.IGNORECASE,
)
# What is no document wherever it lies: pattern of the whole name, and what it is called.
_BESIDE = (
    (re.compile(r"(.*/)?(dataset_infos?|dataset_dict|state|config)\.json"), "{name}"),
    (re.compile(r"(.*/)?((notice|authors|citation)(\.(cff|bib|rst))?)", re.IGNORECASE), "{name}"),
    (re.compile(r".*\.lock"), "*.lock"),
    (re.compile(r"(.*/)?cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow"), "cache-*.arrow"),
    (re.compile(r"[^/]*\.py"), "*.py"),  # the script of a dataset lies at its root
    (re.compile(r".*\.(png|jpe?g|gif|svg)", re.IGNORECASE), "pictures"),
)


def left_out(names: Sequence[str], splits: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Which of a folder's files are not read, and why in a few words; and the splits of those that name one.

    Args:
        names: all visible files, relative to the folder.
        splits: of ``CorpusConfig.split``.

    Raises:
        XtokenError: the only split is asked for, and there are several.
    """
    reasons = {name: why for name in names if (why := _beside(name)) is not None}
    data = [name for name in names if name not in reasons]
    if not all(name.lower().endswith(".md") for name in data):
        # of a folder of pages, a README is one, too
        reasons |= {name: posixpath.basename(name) for name in data if _ABOUT.fullmatch(posixpath.basename(name))}
    data = [name for name in data if name not in reasons]
    known = splits_of(data)
    there = sorted({known.get(name, TRAIN) for name in data})
    if ONLY in splits and len(there) > 1:
        raise XtokenError(f"holds the splits {', '.join(there)}, and one is needed; name its file or folder")
    wanted = there if ALL in splits or ONLY in splits else splits
    others = {name: split for name in data if (split := known.get(name, TRAIN)) not in wanted}
    return reasons | {name: f"split {split}" for name, split in others.items()}, known


def _beside(name: str) -> str | None:
    """What a file is that no reader could read; None if that is not known."""
    base = posixpath.basename(name)
    for pattern, why in _BESIDE:
        if pattern.fullmatch(name):
            return why.format(name=base)
    return base if _ABOUT.fullmatch(base) and not base.lower().endswith(_TEXT) else None


def splits_of(names: Sequence[str]) -> dict[str, str]:
    """The split of each file that names one.

    Texts, whose names are titles, do so only where something is called train.
    """
    split_by_name = {name: split for name in names if (split := split_of(name)) is not None}
    if TRAIN in split_by_name.values():
        return split_by_name
    return {name: split for name, split in split_by_name.items() if not name.lower().endswith(_TEXT)}


def split_of(name: str) -> str | None:
    """train, validation or test, as the first folder, else the file, of a relative name says; None if none does."""
    for part in name.split("/"):
        for word in _SEPARATORS.split(part.lower()):
            if (split := split_named(word)) is not None:
                return split
    return None
