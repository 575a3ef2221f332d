"""What tests of align share: captures to align, runs in processes of their own, and what must hold after."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
from fault_runs import ROOT, Run, files, orphans

from xtoken.pipeline.store.verify import verify
from xtoken.schemas.manifest import TargetManifest, read_manifest

STUDENT, LOSSES = "bytes", "p-kl,h-kl,byte-prefix"
SIDE = ("w.parquet", "unreached.parquet", "student_vocab.parquet", "codes.parquet")


class AlignRun(Run):
    """``xtoken align`` in a process group of its own."""

    def __init__(self, capture: Path | str, out: Path, *flags: object, student: object = STUDENT) -> None:
        words = ["align", capture, "--student", student, "--for", LOSSES, "--out", out, "--quiet", *flags]
        self.out = out
        self._command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
        self._environment = {}


def same_targets(undisturbed: Path, out: Path) -> None:
    """``out`` holds exactly what the undisturbed run gave, and nothing else."""
    assert files(out) == files(undisturbed)
    for name in SIDE:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    theirs, ours = (read_manifest(str(root), TargetManifest) for root in (undisturbed, out))
    unlike = {"argv", "environment"}
    assert ours.model_dump(exclude=unlike) == theirs.model_dump(exclude=unlike)
    assert orphans(out) == []
    verify(str(out))


def sample_ids(root: Path) -> list[str]:
    """Ids of all samples, in order."""
    found = [pq.read_table(path, columns=["sample_id"])["sample_id"] for path in sorted((root / "data").iterdir())]
    return [name.as_py() for column in found for name in column]
