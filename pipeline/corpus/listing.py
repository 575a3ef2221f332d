"""Which files a corpus consists of, in which order, and which reader each has."""

import json
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from xtoken.pipeline.corpus.readers import Reader
from xtoken.pipeline.corpus.splits import left_out
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import named_errors

# suffix -> (module, reader)
FORMATS = {
    ".jsonl": ("xtoken.pipeline.corpus.readers", "read_jsonl"),
    ".jsonl.gz": ("xtoken.pipeline.corpus.readers", "read_jsonl_gz"),
    ".jsonl.zst": ("xtoken.pipeline.corpus.readers", "read_jsonl_zst"),
    ".txt": ("xtoken.pipeline.corpus.readers", "read_text"),
    ".md": ("xtoken.pipeline.corpus.readers", "read_text"),
    ".parquet": ("xtoken.pipeline.corpus.tables", "read_parquet"),
    ".arrow": ("xtoken.pipeline.corpus.tables", "read_arrow"),
}
_DATASET, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class CorpusFile:
    """A file of a corpus: name relative to the corpus root, size in bytes, path or URL for fsspec."""

    name: str
    size: int
    path: str


def suffix_of(name: str) -> str | None:
    """The known suffix of a file name, or None."""
    lower = name.lower()
    return next((suffix for suffix in FORMATS if lower.endswith(suffix)), None)


def reader_of(suffix: str) -> Reader:
    """The reader of a known suffix."""
    module, name = FORMATS[suffix]
    reader: Reader = getattr(import_module(module), name)
    return reader


@dataclass(frozen=True)
class Listing:
    """What a corpus consists of.

    Attributes:
        files: in the order in which they are read.
        splits: of the names that say one.
        left_out: how many files are not read, by what they are.
    """

    files: list[CorpusFile]
    splits: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def read(self) -> dict[str, int]:
        """How many files are read, by their kind and split."""
        kinds = (suffix_of(file.name) or posixpath.splitext(file.name)[1] for file in self.files)
        splits = (self.splits.get(file.name) for file in self.files)
        counts = Counter(
            f"{kind} of split {split}" if split else kind for kind, split in zip(kinds, splits, strict=True)
        )
        return dict(sorted(counts.items()))

    @property
    def figures(self) -> dict[str, dict[str, int]]:
        """What is read and what is not, as verbs print it."""
        return {"files_read": self.read} | ({"files_left_out": self.left_out} if self.left_out else {})

    def label(self, work: str) -> str:
        """What work on it is called: with all that is left out, if anything is."""
        return f"{work} ({said_counts(self.read)}; left out: {said_counts(self.left_out)})" if self.left_out else work


def list_files(fs: Any, root: str, source: str, splits: Sequence[str], planned: Collection[str] = ()) -> Listing:
    """Files of the corpus at ``root``, sorted by name; a saved dataset's in its own order.

    A file that is named itself is read, whatever it is called. Of a folder, names that start with a dot or an
    underscore, files of other splits, and what lies beside data are left out. Files of unknown suffix are listed:
    whether they stop the run is the caller's decision.

    Args:
        fs: where it lies.
        root: file or folder.
        source: what the user calls it.
        splits: of ``CorpusConfig.split``.
        planned: names that are read if they are there, because an earlier run did: it may have been of a release with
            other rules.

    Raises:
        XtokenError: nothing is there, or nothing to be read, or it cannot be listed.
    """
    try:
        with named_errors(source):
            if fs.isfile(root):
                return Listing([_file(fs, root, posixpath.basename(root))])
            if not fs.isdir(root):
                raise XtokenError(f"corpus {source} does not exist; give a file, a folder or an fsspec URL")
            files, hidden = _files(fs, root)
    except OSError as error:
        raise XtokenError(f"corpus {source} cannot be listed ({error}); check its path and rights") from error
    return _chosen(files, hidden, source, splits, planned)


def _chosen(
    files: list[CorpusFile], hidden: int, source: str, splits: Sequence[str], planned: Collection[str]
) -> Listing:
    names = [file.name for file in files]
    try:
        others, known = left_out(names, splits)
    except XtokenError as error:
        raise XtokenError(f"corpus {source} {error}") from error
    others = {name: why for name, why in others.items() if name not in planned}
    chosen = [file for file in files if file.name not in others]
    counts = dict(sorted(Counter(others.values()).items())) | ({"hidden": hidden} if hidden else {})
    if not any(suffix_of(file.name) for file in chosen):
        suffixes = f"known suffixes are {', '.join(FORMATS)}"
        way_out = "--split all reads every split, and a file that is named itself is read whatever it is called"
        said = f"; left out: {said_counts(counts)}; {way_out}" if counts else ""
        raise XtokenError(f"corpus {source} holds no file that can be read; {suffixes}{said}")
    return Listing(chosen, known, counts)


def said_counts(counts: Mapping[str, int]) -> str:
    """Numbers of files in words."""
    return ", ".join(name if count == 1 else f"{name} ({count:,})" for name, count in counts.items())


def _file(fs: Any, path: str, name: str) -> CorpusFile:
    return CorpusFile(name, int(fs.size(path) or 0), str(fs.unstrip_protocol(path)))


def _files(fs: Any, root: str) -> tuple[list[CorpusFile], int]:
    """All visible files, and how many are hidden."""
    if (names := _saved_names(fs, root)) is not None:
        return [_file(fs, posixpath.join(root, name), name) for name in names], 0
    prefix = fs._strip_protocol(root).rstrip("/") + "/"
    listed = {path.removeprefix(prefix): (path, info) for path, info in fs.find(root, detail=True).items()}
    visible = [name for name in sorted(listed) if not any(part.startswith((".", "_")) for part in name.split("/"))]
    for name in visible:
        if listed[name][1].get("islink") and fs.isdir(listed[name][0]):
            raise XtokenError(
                f"{listed[name][0]} is a link to a folder, which is not followed; put the files themselves there"
            )
    files = [
        CorpusFile(name, int(info.get("size") or 0), str(fs.unstrip_protocol(path)))
        for name in visible
        for path, info in [listed[name]]
    ]
    return files, len(listed) - len(files)


def _saved_names(fs: Any, root: str) -> list[str] | None:
    """Files of what ``datasets.save_to_disk`` wrote, in its order; None where it did not write the folder."""
    if fs.exists(posixpath.join(root, _SPLITS)):
        splits = _read_json(fs, posixpath.join(root, _SPLITS), "splits")
        return [f"{split}/{name}" for split in splits for name in _dataset_names(fs, posixpath.join(root, split))]
    return _dataset_names(fs, root) if fs.exists(posixpath.join(root, _DATASET)) else None


def _dataset_names(fs: Any, root: str) -> list[str]:
    return [str(entry["filename"]) for entry in _read_json(fs, posixpath.join(root, _DATASET), "_data_files")]


def _read_json(fs: Any, path: str, key: str) -> Iterator[Any]:
    with fs.open(path, "rb") as file:
        try:
            return iter(json.load(file)[key])
        except (ValueError, KeyError, TypeError) as error:
            raise XtokenError(
                f"{path} is not what datasets.save_to_disk writes ({error!r}); save the dataset again"
            ) from error
