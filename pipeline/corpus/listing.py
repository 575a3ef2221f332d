"""Which files a corpus consists of, in which order, and which reader each has."""

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pipeline.corpus.readers import Reader
from schemas.errors import XtokenError

# suffix -> (module, reader)
FORMATS = {
    ".jsonl": ("pipeline.corpus.readers", "read_jsonl"),
    ".jsonl.gz": ("pipeline.corpus.readers", "read_jsonl_gz"),
    ".jsonl.zst": ("pipeline.corpus.readers", "read_jsonl_zst"),
    ".txt": ("pipeline.corpus.readers", "read_text"),
    ".md": ("pipeline.corpus.readers", "read_text"),
    ".parquet": ("pipeline.corpus.tables", "read_parquet"),
    ".arrow": ("pipeline.corpus.tables", "read_arrow"),
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


def list_files(fs: Any, root: str, source: str) -> list[CorpusFile]:
    """Files of the corpus at ``root``, sorted by name; a saved dataset's in its own order.

    Names that start with a dot or an underscore are not part of a corpus. Files of unknown suffix
    are listed: whether they stop the run is the caller's decision.

    Raises:
        XtokenError: nothing is there, or it cannot be listed.
    """
    try:
        if fs.isfile(root):
            return [_file(fs, root, posixpath.basename(root))]
        if not fs.isdir(root):
            raise XtokenError(f"corpus {source} does not exist; give a file, a folder or an fsspec URL")
        names = _names(fs, root, source)
        return [_file(fs, posixpath.join(root, name), name) for name in names]
    except OSError as error:
        raise XtokenError(f"corpus {source} cannot be listed ({error}); check its path and rights") from error


def _file(fs: Any, path: str, name: str) -> CorpusFile:
    return CorpusFile(name, int(fs.size(path) or 0), str(fs.unstrip_protocol(path)))


def _names(fs: Any, root: str, source: str) -> list[str]:
    if fs.exists(posixpath.join(root, _SPLITS)):
        splits = _read_json(fs, posixpath.join(root, _SPLITS), "splits")
        return [f"{split}/{name}" for split in splits for name in _dataset_names(fs, posixpath.join(root, split))]
    if fs.exists(posixpath.join(root, _DATASET)):
        return _dataset_names(fs, root)
    prefix = fs._strip_protocol(root).rstrip("/") + "/"
    names = sorted(path.removeprefix(prefix) for path in fs.find(root))
    visible = [name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))]
    if not any(suffix_of(name) for name in visible):
        raise XtokenError(f"corpus {source} holds no file that can be read; known suffixes are {', '.join(FORMATS)}")
    return visible


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
