"""Which weights a teacher's folder holds.

Hashing them reads every byte, 62 GB of a model of 31 billion weights: once per run is enough (see
``xtoken.pipeline.capture.run_identity.settle_weights``).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path

from xtoken.schemas.manifest import digest

_PATTERNS = ("*.safetensors", "*.bin")
_READERS = 4  # files at a time: one core hashes less than a disk gives


def weight_files(source: str) -> list[Path]:
    """Weight files of a local folder by name, of the first kind it has; none of a hub model."""
    folder = Path(source)
    found = (sorted(folder.glob(pattern)) for pattern in _PATTERNS if folder.is_dir())
    return next((files for files in found if files), [])


def looks(files: Sequence[Path]) -> str:
    """Hash of names, sizes and times of files: the same as long as nobody wrote to them."""
    return digest([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


def content_hash(files: Sequence[Path]) -> str:
    """sha256 over names and contents of files."""
    with ThreadPoolExecutor(_READERS) as pool:
        return digest([[file.name, sha256] for file, sha256 in zip(files, pool.map(_sha256, files), strict=True)])


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return file_digest(handle, "sha256").hexdigest()
