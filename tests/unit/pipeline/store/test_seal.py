"""SHA256SUMS: what it covers, that the standard tool reads it, and that no byte of an artifact is outside of it."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.seal import SUMS_FILE, read_sums, seal, sums_text
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.errors import VerificationError, XtokenError


def test_the_standard_tool_accepts_it(kept_capture):
    done = subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=kept_capture, capture_output=True, text=True, check=True)
    listed = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    assert listed == set(read_sums(Folder(str(kept_capture))))
    there = {str(path.relative_to(kept_capture)) for path in kept_capture.rglob("*") if path.is_file()}
    # what lies beside stays with the run
    assert there - listed == {SUMS_FILE, "run.json", "teacher.json", "status.json", "log.jsonl"}


def test_sealing_again_changes_nothing(capture):
    before = (capture / SUMS_FILE).stat()
    seal(str(capture))
    assert (capture / SUMS_FILE).stat().st_mtime_ns == before.st_mtime_ns


def shared_files(root: Path) -> list[Path]:
    listed = [root / name for name in read_sums(Folder(str(root)))]
    return [*listed, root / SUMS_FILE]


def test_a_flipped_byte_anywhere_is_found_and_named(capture):
    random = np.random.default_rng(0)
    verify(str(capture))
    for path in shared_files(capture):
        whole = path.read_bytes()
        for _ in range(3):
            at, change = int(random.integers(len(whole))), int(random.integers(1, 256))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            with pytest.raises(XtokenError) as caught:
                verify(str(capture))
            assert caught.value.exit_code == 3
            # of a part or a record its number is named, and of a line of SHA256SUMS the file it speaks of
            named = [path.name, path.stem.removeprefix("part-").lstrip("0").rjust(1, "0"), SUMS_FILE]
            assert any(name in str(caught.value) for name in named), (path, at, str(caught.value))
        path.write_bytes(whole)
    verify(str(capture))


def test_a_missing_seal_is_found(capture):
    (capture / SUMS_FILE).unlink()
    with pytest.raises(VerificationError, match="SHA256SUMS is missing"):
        verify(str(capture))


def test_a_file_more_or_less_is_found(capture):
    (capture / "plan.json").unlink()
    with pytest.raises(VerificationError, match=r"'plan\.json' is not there"):
        verify(str(capture))
    with pytest.raises(VerificationError, match=r"plan\.json is not what SHA256SUMS of the finished capture says"):
        seal(str(capture))  # as a run that finds nothing to do: it is not to hide what is lost
    (capture / SUMS_FILE).unlink()
    seal(str(capture))
    verify(str(capture))
    (capture / "README.md").write_text("not sealed")
    with pytest.raises(VerificationError, match=r"README\.md: sha256 .* says nothing"):
        verify(str(capture))


@pytest.mark.parametrize("line", ["x", "0" * 64 + " one-space", "0" * 63 + "g  name", "0" * 64 + "  two\tnames"])
def test_lines_of_another_form_are_refused_and_names_are_not_followed(capture, line):
    path = capture / SUMS_FILE
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(VerificationError, match="SHA256SUMS is damaged"):
        read_sums(Folder(str(capture)))
    path.write_bytes(sums_text({"../secret": "0" * 64, "manifest.json": "0" * 64}))
    with pytest.raises(VerificationError, match=r"'\.\./secret' is not there, or no file of this artifact"):
        verify(str(capture))
