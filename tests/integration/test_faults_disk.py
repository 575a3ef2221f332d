"""A disk that is full says so, wherever it strikes, and the same command finishes once there is room.

RLIMIT_FSIZE stands for the disk: a file may not grow beyond it, which is an error of the same family as no space.
"""

import re
import resource
import subprocess
from pathlib import Path

import pytest
from fault_runs import Run, commits, files, orphans, same_as

from xtoken.pipeline.store.files import Folder

SAID = r"no room to write in .*what is committed stays: free some space and run the same command again"


def with_limit(run: Run, size: int) -> "subprocess.Popen[bytes]":
    """The driver and all its workers may write files of that size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        return run.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(process: "subprocess.Popen[bytes]") -> str:
    error = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 2, error
    assert re.search(SAID, error), error
    assert "Traceback" not in error
    return error


def largest(folder: Path, pattern: str) -> int:
    return max(path.stat().st_size for path in folder.glob(pattern))


@pytest.mark.parametrize("target", ["part", "manifest"])
def test_a_full_disk(undisturbed, tmp_path, figure, target):
    whole, out = Path(undisturbed.out), tmp_path / "out"
    config = undisturbed.changed(out=str(out), workers=1)
    run = Run(config, tmp_path)
    if target == "manifest":
        # everything is there but the manifest, which is larger than any record
        run.finish()
        for name in ("manifest.json", "SHA256SUMS"):
            (out / name).unlink()
        limit = largest(whole, "manifest.json") // 2
    else:
        # the vocabulary, larger than any part, is there already
        Folder(str(out)).make("")
        run.finish()
        for name in ("manifest.json", "SHA256SUMS"):
            (out / name).unlink()
        for index in range(3, len(files(whole))):
            (out / "data" / f"part-{index:05d}.parquet").unlink()
            (out / "commits" / f"part-{index:05d}.json").unlink()
        limit = (whole / "data" / "part-00003.parquet").stat().st_size // 2
    before = len(commits(out))
    refused(with_limit(run, limit))
    assert len(commits(out)) == before
    assert orphans(out) == []
    run.finish()
    same_as(whole, out)
    figure(f"disk full at the {target}: exit code 2 with {before} parts committed, the same command finished")


def test_a_disk_that_is_full_for_a_record_only(undisturbed, tmp_path):
    """The part was published, its record found no room: the next run adopts the file."""
    whole, out = Path(undisturbed.out), tmp_path / "out"
    run = Run(undisturbed.changed(out=str(out), workers=1), tmp_path)
    run.finish()
    for name in ("manifest.json", "SHA256SUMS", "commits/part-00002.json"):
        (out / name).unlink()
    # a folder in which nothing can be created, while others can be written
    kept = (out / "data" / "part-00002.parquet").stat()
    limit = largest(whole, "commits/*") // 2
    refused(with_limit(run, max(limit, 1)))
    assert orphans(out) == []
    run.finish()
    same_as(whole, out)
    assert (out / "data" / "part-00002.parquet").stat().st_ino == kept.st_ino, "the published file was taken"
