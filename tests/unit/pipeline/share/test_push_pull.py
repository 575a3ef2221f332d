"""push and pull: nothing wrong arrives, nothing is lost on the way, and the same command goes on."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from huggingface_hub import CommitOperationDelete

from xtoken.pipeline.project import project
from xtoken.pipeline.share import destination as destination_module
from xtoken.pipeline.share import transfer as transfer_module
from xtoken.pipeline.share.destination import Destination, HubDestination
from xtoken.pipeline.share.push_pull import pull, push
from xtoken.pipeline.share.shipment import CLAIM_FILE
from xtoken.pipeline.store.files import DiskFull, Folder
from xtoken.pipeline.store.publish import clean, commit_name, data_name
from xtoken.pipeline.store.seal import seal
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import ProjectConfig
from xtoken.schemas.configs.share import PullConfig, PushConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

LICENSE = ["corpus=cc-by-4.0", "outputs=gemma"]


@pytest.fixture(params=["local", "memory"])
def target(request, tmp_path):
    return str(tmp_path / "copy") if request.param == "local" else f"memory://{uuid.uuid4()}/copy"


def pulled(source, destination, **options) -> dict[str, Any]:
    return pull(PullConfig(source=str(source), destination=str(destination), **options), Silent())


def pushed(source, destination, **options) -> dict[str, Any]:
    return push(PushConfig(source=str(source), destination=str(destination), **options), Silent())


def files_below(root: str) -> dict[str, bytes]:
    fs, path = fsspec.core.url_to_fs(str(root))
    top = fs._strip_protocol(path)
    return {name.removeprefix(top).strip("/"): fs.cat_file(name) for name in fs.find(path)}


def expected_names(manifest: CaptureManifest) -> set[str]:
    sides = {"manifest.json", "plan.json", "SHA256SUMS", "vocab.parquet", "merges.parquet"}
    return sides | {name(part.index) for part in manifest.parts for name in (data_name, commit_name)}


class Count:
    """Counts what is put at destinations; ``fails`` is raised at the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 10**9, fails: BaseException | None = None) -> None:
        self.names: list[str] = []
        self.at, self.fails, self.real = at, fails, Destination.put
        count = self

        def put(self: Destination, path: str, name: str) -> None:
            count.names.append(name)
            if len(count.names) == count.at:
                raise count.fails
            count.real(self, path, name)

        monkeypatch.setattr(Destination, "put", put)


def test_a_whole_capture_arrives_and_the_second_time_nothing_is_done(kept_capture, target):
    figures = pulled(kept_capture, target)
    manifest = read_manifest(str(kept_capture), CaptureManifest)
    assert verify(target) == verify(str(kept_capture))
    assert read_manifest(target, CaptureManifest) == manifest
    found = files_below(target)
    assert set(found) == expected_names(manifest)
    assert (figures["kind"], figures["parts"], figures["bytes_kept"]) == ("capture", len(manifest.parts), 0)
    assert (figures["files"], figures["destination"], figures["result"]) == (3, target, "complete")
    assert figures["bytes_copied"] == sum(len(found[name]) for name in found if name.split(".")[-1] == "parquet") + len(
        found["plan.json"]
    )
    again = pulled(kept_capture, target)
    assert (again["bytes_copied"], again["result"]) == (0, "complete already, nothing to do")


def test_sha256sums_is_of_what_arrived(kept_capture, target):
    pulled(kept_capture, target)
    found = files_below(target)
    lines = dict(reversed(line.split("  ")) for line in found.pop("SHA256SUMS").decode().splitlines())
    assert lines == {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def flip(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])


DAMAGE = {
    "has sha256": flip,
    "is longer than its record says": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "is missing": lambda path: path.unlink(),
    "has sha256 ": lambda path: path.write_bytes(path.read_bytes()[:-3]),
}


@pytest.mark.parametrize("rule", DAMAGE)
def test_a_damaged_part_is_refused_and_does_not_appear(capture, kept_capture, target, rule):
    DAMAGE[rule](capture / data_name(1))
    with pytest.raises(VerificationError, match=rule) as caught:
        pulled(capture, target, workers=1)
    assert data_name(1) in str(caught.value)
    there = files_below(target)
    assert data_name(0) in there
    assert not {data_name(1), commit_name(1), "manifest.json"} & set(there)
    assert not [name for name in there if name.endswith(".tmp")]
    shutil.copy(kept_capture / data_name(1), capture / data_name(1))
    assert pulled(capture, target)["bytes_kept"] > 0
    assert verify(target) == verify(str(kept_capture))


def test_damaged_side_files_are_refused(capture, tmp_path):
    pulled(capture, tmp_path / "sealed")
    for name in ("vocab.parquet", "plan.json"):
        whole = (tmp_path / "sealed" / name).read_bytes()
        (tmp_path / "sealed" / name).write_bytes(whole.replace(whole[200:203], b"abc"))
        with pytest.raises(VerificationError, match=f"{name} has sha256"):
            pulled(tmp_path / "sealed", tmp_path / "copy")
        assert not (tmp_path / "copy" / name).exists()
        (tmp_path / "sealed" / name).write_bytes(whole)


def stop(source, target, monkeypatch, at: int = 3, fails: BaseException | None = None) -> None:
    """Pull until the n-th file is put."""
    with monkeypatch.context() as patch:
        Count(patch, at, fails or KeyboardInterrupt())
        with pytest.raises((XtokenError, KeyboardInterrupt)):
            pulled(source, target, workers=1)


@pytest.mark.parametrize("at", range(1, 11))
def test_stopped_anywhere_the_same_command_goes_on(kept_capture, target, monkeypatch, at):
    stop(kept_capture, target, monkeypatch, at, KeyboardInterrupt() if at % 2 else OSError(errno.EIO, "gone"))
    there = set(files_below(target))
    assert "manifest.json" not in there
    assert not [name for name in there if name.endswith(".tmp")]
    done = [number for number in range(3) if commit_name(number) in there]
    counted = Count(monkeypatch)
    figures = pulled(kept_capture, target)
    assert verify(target) == verify(str(kept_capture))
    assert set(files_below(target)) == expected_names(read_manifest(str(kept_capture), CaptureManifest))
    assert not {data_name(number) for number in done} & set(counted.names)
    assert figures["bytes_kept"] == sum((kept_capture / data_name(number)).stat().st_size for number in done)
    assert counted.names[-1] == "manifest.json"


def test_what_a_killed_copy_left_is_swept_away(kept_capture, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    stop(kept_capture, copy, monkeypatch)
    (copy / "part-00002.parquet.0123456789ab.tmp").write_bytes(b"half a part")
    (copy / "data" / "part-00002.parquet").write_bytes(b"no record vouches for this")
    pulled(kept_capture, copy)
    assert set(files_below(copy)) == expected_names(read_manifest(str(kept_capture), CaptureManifest))
    verify(str(copy))


class Sweeps:
    """Another copy into the same folder begins before each of the first ``times`` puts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left, self.real = times, Destination.put
        sweeps = self

        def put(self: Destination, path: str, name: str) -> None:
            if sweeps.left:
                sweeps.left -= 1
                clean(self.folder.root)
            sweeps.real(self, path, name)

        monkeypatch.setattr(Destination, "put", put)


@pytest.mark.parametrize("options", [{}, {"where": "first_row >= 0"}])
def test_two_copies_into_one_folder(kept_capture, tmp_path, monkeypatch, options):
    Sweeps(monkeypatch, times=4)
    pulled(kept_capture, tmp_path / "copy", workers=1, **options)
    verify(str(tmp_path / "copy"))


def test_another_copy_that_goes_on_sweeping_is_named(kept_capture, tmp_path, monkeypatch):
    Sweeps(monkeypatch, times=10**6)
    with pytest.raises(XtokenError, match=r"another command writes into .*copy and removes"):
        pulled(kept_capture, tmp_path / "copy", workers=1)


def test_a_copy_of_something_else_sweeps_nothing(kept_capture, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    stop(kept_capture, copy, monkeypatch)
    waits = copy / "part-00002.parquet.0123456789ab.tmp"
    waits.touch()
    with pytest.raises(XtokenError, match="holds"):
        pulled(kept_capture, copy, parts="0")
    assert waits.exists()


def test_a_part_that_went_missing_is_copied_again(kept_capture, target):
    pulled(kept_capture, target)
    folder = Folder(target)
    folder.remove(data_name(1))
    folder.replace(data_name(2), b"short")
    pulled(kept_capture, target)
    assert verify(target) == verify(str(kept_capture))


def test_a_full_disk_says_so(kept_capture, tmp_path, monkeypatch):
    Count(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(DiskFull, match="free some space and run the same command again"):
        pulled(kept_capture, tmp_path / "copy", workers=1)


def edited(root: Path, **changes: Any) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(manifest | changes))
    seal(str(root))


def test_another_artifact_is_never_written_over(capture, kept_capture, target, monkeypatch):
    pulled(kept_capture, target)
    before = files_below(target)
    counted = Count(monkeypatch)
    edited(capture, run_hash="f" * 64, max_tokens=65)
    with pytest.raises(XtokenError, match="holds another artifact") as caught:
        pulled(capture, target)
    assert "max_tokens: 64 there, 65 here" in str(caught.value)
    assert "run_hash" in str(caught.value)
    with pytest.raises(XtokenError, match="derived_from"):
        pulled(kept_capture, target, parts="0")
    assert (counted.names, files_below(target)) == ([], before)


def test_half_of_another_copy_is_never_written_over(kept_capture, target, monkeypatch):
    stop(kept_capture, target, monkeypatch)
    counted = Count(monkeypatch)
    with pytest.raises(XtokenError, match=r"parts: null there, \"0-1\" here"):
        pulled(kept_capture, target, parts="0-1")
    assert counted.names == []


def test_folders_of_something_else_are_refused(kept_capture, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(XtokenError, match=f"holds 'notes.txt' and no {CLAIM_FILE}"):
        pulled(kept_capture, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", [data_name(0), "vocab.parquet", "plan.json", "data"])
def test_links_are_not_followed(capture, tmp_path, name):
    outside = tmp_path / "outside"
    os.rename(capture / name, outside)
    (capture / name).symlink_to(outside)
    with pytest.raises(VerificationError, match="is a symbolic link"):
        pulled(capture, tmp_path / "copy")


def test_a_destination_is_not_left_through_a_link(kept_capture, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "copy" / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(XtokenError, match="is a symbolic link"):
        pulled(kept_capture, tmp_path / "copy")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "notes.txt"])
def test_names_in_a_manifest_are_not_followed(capture, tmp_path, name):
    manifest = json.loads((capture / "manifest.json").read_text())
    edited(capture, files=manifest["files"] | {name: "0" * 64})
    with pytest.raises(VerificationError, match="which is not a file of capture"):
        pulled(capture, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_no_artifact_there(tmp_path):
    with pytest.raises(XtokenError, match="is not a finished artifact"):
        pulled(tmp_path / "nothing", tmp_path / "copy")


def test_push_needs_a_card_or_licences(kept_capture, target):
    with pytest.raises(XtokenError, match=r"--license corpus=ID,outputs=ID.*xtoken share card"):
        pushed(kept_capture, target)
    assert files_below(target) == {}


def test_push_writes_the_card_at_the_destination_only(kept_capture, target):
    before = files_below(kept_capture)
    pushed(kept_capture, target, license=LICENSE)
    found = files_below(target)
    assert files_below(kept_capture) == before
    manifest = read_manifest(target, CaptureManifest)
    assert manifest.licenses == {"corpus": "cc-by-4.0", "outputs": "gemma"}
    assert manifest.parts == read_manifest(str(kept_capture), CaptureManifest).parts
    assert b"cc-by-4.0" in found["README.md"]
    plots = {name for name in found if name.startswith("plots/")}
    assert set(found) == expected_names(manifest) | {"README.md"} | plots
    sums = found["SHA256SUMS"].decode()
    assert all(name in sums for name in {"README.md", *plots})
    verify(target)
    assert pushed(kept_capture, target, license=LICENSE)["bytes_copied"] == 0
    with pytest.raises(XtokenError, match="licenses"):
        pushed(kept_capture, target, license=["corpus=mit", "outputs=gemma"])


def test_a_card_travels_as_it_is(kept_capture, target, tmp_path):
    pushed(kept_capture, target, license=LICENSE)
    pushed(target, tmp_path / "further")
    pulled(target, tmp_path / "fetched")
    assert files_below(tmp_path / "further") == files_below(tmp_path / "fetched") == files_below(target)


def test_a_subset_is_pushed_with_a_card_of_its_own(kept_capture, target, tmp_path):
    pushed(kept_capture, tmp_path / "whole", license=LICENSE)
    pushed(tmp_path / "whole", target, where="complete", columns=["text"])
    verify(target)
    whole, subset = ((files_below(root)["README.md"]) for root in (tmp_path / "whole", target))
    samples = sum(part.samples for part in read_manifest(target, CaptureManifest).parts)
    assert whole != subset
    assert f"{samples}".encode() in subset


class Progress(Silent):
    """Remembers what it is told."""

    def start(self, label: str, total: int | None, unit: str, done: int = 0) -> None:
        assert unit == "bytes"
        self.label, self.total, self.count = label, total, done

    def note(self, text: str) -> None: ...

    def advance(self, amount: int, **figures: float | str) -> None:
        assert not figures
        self.count += amount


def test_progress_ends_at_its_total(kept_capture, target):
    bars, config = Progress(), PullConfig(source=str(kept_capture), destination=target, workers=3)
    pull(config, bars)
    parts = read_manifest(str(kept_capture), CaptureManifest).parts
    assert (bars.label, bars.total, bars.count) == ("pull", sum(p.file_bytes for p in parts), bars.total)
    pull(config, bars)
    assert (bars.label, bars.count) == (f"{target} is complete, nothing to do", bars.total)


def test_files_are_copied_at_once(kept_capture, tmp_path, monkeypatch):
    """Every worker waits for the others before it puts its part: with fewer at once this would never end."""
    import threading

    barrier = threading.Barrier(3, timeout=120)
    real = Destination.put

    def put(self: Destination, path: str, name: str) -> None:
        if name.startswith("data/"):
            barrier.wait()
        real(self, path, name)

    monkeypatch.setattr(Destination, "put", put)
    assert pulled(kept_capture, tmp_path / "copy", workers=3)["parts"] == 3


def test_a_projection_travels_too(kept_capture, target, tmp_path):
    project(ProjectConfig(student="bytes", teacher=str(kept_capture), out=str(tmp_path / "w")), Silent())
    assert pushed(tmp_path / "w", target)["kind"] == "projection"
    assert set(files_below(target)) == {
        *("manifest.json", "SHA256SUMS", "w.parquet", "unreached.parquet", "coverage.html")
    }
    assert verify(target) == verify(str(tmp_path / "w"))
    assert pulled(target, tmp_path / "back")["parts"] == 0
    with pytest.raises(XtokenError, match="is a projection, which has no parts"):
        pulled(target, tmp_path / "part", parts="0")


class Hub:
    """Stands for ``huggingface_hub.HfApi``: commits are folders of bytes, all or nothing."""

    def __init__(self, root: str) -> None:
        self.fs, self.path = fsspec.core.url_to_fs(root)
        self.commits: list[list[str]] = []
        self.fails_at = 10**9

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert (repo_id, repo_type, private, exist_ok) == ("team/capture", "dataset", True, True)

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str, **where: Any) -> None:
        assert (repo_id, where) == ("team/capture", {"repo_type": "dataset", "revision": None})
        assert commit_message.startswith("xtoken share: ")
        if len(self.commits) + 1 == self.fails_at:
            raise ConnectionError("the hub is away")
        self.commits.append([operation.path_in_repo for operation in operations])
        for operation in operations:
            name = f"{self.path}/{operation.path_in_repo}"
            if isinstance(operation, CommitOperationDelete):
                self.fs.rm_file(name)
            else:
                self.fs.pipe_file(name, Path(operation.path_or_fileobj).read_bytes())


@pytest.fixture
def hub(monkeypatch):
    """A hub in memory, where hf://datasets/team/capture is this folder."""
    root = f"memory://{uuid.uuid4()}/team"
    api = Hub(root)

    def opened(url: str) -> HubDestination:
        found = HubDestination(url, api)
        found.folder = Folder(root)
        return found

    monkeypatch.setattr(transfer_module, "open_destination", opened)
    return api, root


def pushed_to_hub(source) -> dict[str, Any]:
    config = PushConfig(source=str(source), destination="hf://datasets/team/capture", license=LICENSE)
    return push(config, Silent())


def test_a_hub_gets_one_commit(kept_capture, hub):
    api, root = hub
    pushed_to_hub(kept_capture)
    assert len(api.commits) == 1
    verify(root)
    assert CLAIM_FILE not in files_below(root)
    assert pushed_to_hub(kept_capture)["bytes_copied"] == 0
    assert len(api.commits) == 1


def test_a_hub_gets_batches_and_the_same_command_goes_on(kept_capture, hub, monkeypatch):
    api, root = hub
    monkeypatch.setattr(destination_module, "HUB_FILES", 3)
    api.fails_at = 3
    with pytest.raises(XtokenError, match="the hub is away"):
        pushed_to_hub(kept_capture)
    before = set(files_below(root))
    assert len(before) == 6
    assert "manifest.json" not in before
    api.fails_at = 10**9
    figures = pushed_to_hub(kept_capture)
    assert figures["bytes_kept"] > 0
    verify(root)
    # the claim's removal may fall into a batch of its own
    assert any("manifest.json" in commit for commit in api.commits[-2:])
    assert CLAIM_FILE not in files_below(root)


@pytest.mark.parametrize("url", ["hf://team/model", "hf://datasets/alone", "hf://datasets/a/b/../c"])
def test_other_places_of_a_hub_are_refused(url):
    with pytest.raises(XtokenError, match="is not a dataset of the hub"):
        HubDestination(url, None)
