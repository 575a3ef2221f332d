"""Workers on different devices fill one capture: parts say where they were made, rows agree within rounding."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.capture import precompute, worker
from xtoken.pipeline.capture.audit import open_audit
from xtoken.pipeline.executors.protocol import Event, Job, Lease, Watch
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.teachers import BACKENDS, open_teacher
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.share import PullConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import ONE_DEVICE, SEVERAL_PATHS, CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
NOISE = 2e-3  # nats: what kernels of two devices differ by


def on(device: str, **changes: str) -> Any:
    """``open_teacher`` of a machine with such a device, whose rows are off by a little."""
    seed = len(device)

    def opened(*arguments: Any) -> Any:
        teacher: Any = open_teacher(*arguments)
        teacher.info = teacher.info.model_copy(update={"device": device, **changes})
        first = teacher.rows

        def noisy(batch: Sequence[NDArray[np.int32]]) -> list[TeacherRows]:
            random = np.random.default_rng(seed)
            return [
                replace(
                    rows,
                    logprob=rows.logprob - random.random(rows.logprob[:, :1].shape).astype(np.float32) * NOISE,
                    target_logprob=rows.target_logprob - np.float32(NOISE),
                )
                for rows in first(batch)
            ]

        teacher.rows = noisy
        teacher.second_path = noisy
        return teacher

    return opened


class Fleet:
    """An executor in this process: a worker per device, which take the shards in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *devices: str, paths: Sequence[str] = ()) -> None:
        self.monkeypatch, self.devices, self.paths = monkeypatch, devices, paths

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:
        for number, device in enumerate(self.devices):
            changes = {"capture_path": self.paths[number]} if self.paths else {}
            self.monkeypatch.setattr(worker, "open_teacher", on(device, **changes))
            mine = iter([Lease(shard) for shard in shards if shard % len(self.devices) == number])
            job.open().serve(mine, lambda message: watch.see(Event("part", shard=message.shard, part=message.part)))
        return {}


@pytest.fixture
def config(tmp_path: Path) -> PrecomputeConfig:
    texts = [f"Document {number}: " + "some words, and 1234 numbers. " * 9 for number in range(6)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = {"corpus": str(tmp_path / "corpus.jsonl"), "out": str(tmp_path / "out")}
    return PrecomputeConfig.from_flat(**files, teacher="bytes", backend="fake", k=8, max_tokens=64, shard_bytes=300)


def test_parts_of_a_mixed_fleet_name_their_device(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = precompute(config, Silent(), executor=Fleet(monkeypatch, H100, H200))
    assert found is not None
    assert found.teacher.device == f"{H100} + {H200}"
    assert found.schema_version == ONE_DEVICE + 1
    assert {part.index % 2: part.device for part in found.parts} == {0: None, 1: H200}
    assert "device" not in json.loads((Path(config.out) / "commits" / "part-00000.json").read_text())
    assert verify(config.out, audit=True)["worst_of_audits"]["realised_max"] < 5 * NOISE
    pull(PullConfig(source=config.out, destination=str(tmp_path / "some"), parts="1-2", where="true"), Silent())
    verify(str(tmp_path / "some"))
    assert [part.device for part in read_manifest(str(tmp_path / "some"), CaptureManifest).parts] == [H200, None]


def test_a_run_is_taken_up_on_another_device(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    half = config.changed(cell="1/2")
    assert precompute(half, Silent(), executor=Fleet(monkeypatch, H100)) is None
    found = precompute(config, Silent(), executor=Fleet(monkeypatch, H200))
    assert found is not None
    assert found.teacher.device == f"{H100} + {H200}"


def test_a_fleet_of_one_kind_writes_what_older_releases_read(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = precompute(config, Silent(), executor=Fleet(monkeypatch, H100, H100))
    assert found is not None
    assert (found.teacher.device, found.schema_version) == (H100, ONE_DEVICE)
    assert not any("device" in part for part in json.loads((Path(config.out) / "manifest.json").read_text())["parts"])


def test_an_audit_compares_across_devices(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    precompute(config, Silent(), executor=Fleet(monkeypatch, H100))
    tokenizer = worker.open_tokenizer(config.teacher)
    elsewhere = on(H200)(config.teacher, config.codec, tokenizer.table)
    look = open_audit(config, Folder(config.out), tokenizer, elsewhere, np.zeros(0, np.int32))
    assert look is not None
    look(1)  # made on the other device


WHOLE, TOP = "whole-rows", "top-only"


@pytest.fixture
def top_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that falls back to the top k, as vLLM does where its whole rows fail their self-test."""
    monkeypatch.setitem(BACKENDS, "fake", BACKENDS["fake"]._replace(top_only=(TOP, f"{TOP}-too")))


def spaces(config: PrecomputeConfig) -> set[bool]:
    """Whether samples have P(a word begins)."""
    return {value for batch in iter_capture(config.out) for value in batch["space_logprob"].is_valid().to_pylist()}


@pytest.mark.usefixtures("top_only")
def test_a_worker_that_gives_less_than_the_run_began_with_is_refused(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(XtokenError, match=f"top k only \\({TOP}"):
        precompute(config, Silent(), executor=Fleet(monkeypatch, H100, H100, paths=(WHOLE, TOP)))
    found = precompute(config, Silent(), executor=Fleet(monkeypatch, H100, paths=(WHOLE,)))
    assert found is not None
    assert (found.teacher.capture_path, found.schema_version) == (WHOLE, ONE_DEVICE)
    assert spaces(config) == {True}


@pytest.mark.usefixtures("top_only")
def test_a_worker_that_gives_more_leaves_it_out(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where a run of an older release goes on."""
    found = precompute(config, Silent(), executor=Fleet(monkeypatch, H100, H100, paths=(TOP, WHOLE)))
    assert found is not None
    assert (found.teacher.capture_path, found.schema_version) == (f"{TOP} + {WHOLE}", SEVERAL_PATHS)
    assert {part.index % 2: part.capture_path for part in found.parts} == {0: None, 1: WHOLE}
    assert spaces(config) == {False}
    verify(config.out)
    pull(PullConfig(source=config.out, destination=str(tmp_path / "some"), parts="1-2", where="true"), Silent())
    copy = read_manifest(str(tmp_path / "some"), CaptureManifest)
    assert [part.capture_path for part in copy.parts] == [WHOLE, None]


@pytest.mark.usefixtures("top_only")
def test_ways_that_give_the_same_columns_meet_in_one_run(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = precompute(config, Silent(), executor=Fleet(monkeypatch, H100, H200, paths=(TOP, f"{TOP}-too")))
    assert found is not None
    assert found.schema_version == SEVERAL_PATHS
    assert {(part.device, part.capture_path) for part in found.parts} == {(None, None), (H200, f"{TOP}-too")}
    older = json.loads((Path(config.out) / "manifest.json").read_text()) | {"schema_version": SEVERAL_PATHS - 1}
    with pytest.raises(ValueError, match="version 4 does not know"):
        CaptureManifest.model_validate(older)
