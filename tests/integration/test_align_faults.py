"""Align under faults: killed at any moment it resumes to the same bytes; bad parts and samples are named, not lost."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from align_runs import AlignRun, same_targets, sample_ids
from fault_runs import (
    Run,
    commits,
    documents,
    ended,
    files,
    group_lives,
    orphans,
    running,
    settings,
    wait_for,
    workers_of,
    write_corpus,
)
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.align import align
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_targets
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import IncompleteRun, VerificationError, XtokenError
from xtoken.schemas.manifest import MANIFEST, CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.targets import Targets

KILLS = 6


@pytest.fixture(scope="module")
def capture(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in a dozen parts, by the fake teacher with a real tokenizer."""
    folder = tmp_path_factory.mktemp("capture")
    corpus = write_corpus(folder / "corpus.jsonl", documents())
    Run(settings(corpus, tokenizer_file("smollm2"), folder / "capture"), folder).finish()
    return folder / "capture"


@pytest.fixture(scope="module")
def whole(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of a run that was left alone, by one worker."""
    out = tmp_path_factory.mktemp("whole") / "targets"
    AlignRun(capture, out).finish()
    return out


def test_kill_9_of_everything_at_random_moments(capture: Path, whole: Path, tmp_path: Path, figure: Any) -> None:
    parts, moments = len(files(whole)), random.Random(20261122)
    kills = rounds = left = 0
    committed: list[int] = []
    while kills < KILLS:
        rounds += 1
        assert rounds < 4 * KILLS
        run = AlignRun(capture, tmp_path / f"out-{rounds}", "--workers", 2)
        # a few kills per folder, so that resumed runs are killed too, the first of them while the program starts
        for at in (0, *sorted(moments.sample(range(1, parts - 4), 2))):
            if kills < KILLS and run.kill_at(at, moments.uniform(0.0, 0.3)):
                kills += 1
                committed.append(len(commits(run.out)))
                left += len(orphans(run.out)) if run.out.exists() else 0
        run.finish()
        same_targets(whole, run.out)
        shutil.rmtree(run.out)
    figure(
        f"align: {kills} x kill -9 with {committed} of {parts} parts committed, {rounds} runs, "
        f"{left} temporary files left and cleaned, same bytes"
    )


def test_killing_workers_costs_nothing(capture: Path, whole: Path, tmp_path: Path, figure: Any) -> None:
    run, killed = AlignRun(capture, tmp_path / "out", "--workers", 2), list[int]()
    with running(run) as process:
        for at in (1, 3, 5):
            wait_for(lambda at=at: len(commits(run.out)) >= at, 180)
            wait_for(lambda: set(workers_of(process.pid)) - set(killed), 180)
            victim = min(set(workers_of(process.pid)) - set(killed))
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
        ended(process)
    same_targets(whole, run.out)
    figure(f"align: {len(killed)} workers killed with -9 in one run, which ended by itself with the same bytes")


def test_a_killed_driver_takes_its_workers_along(capture: Path, whole: Path, tmp_path: Path) -> None:
    run = AlignRun(capture, tmp_path / "out", "--workers", 2)
    with running(run) as process:
        wait_for(lambda: commits(run.out), 180)
        os.kill(process.pid, signal.SIGKILL)  # the driver alone
        process.communicate(timeout=180)
        wait_for(lambda: not group_lives(process.pid), 120)
    run.finish()
    same_targets(whole, run.out)


@pytest.fixture
def broken(capture: Path, tmp_path: Path) -> Path:
    """A copy of the capture, to be damaged."""
    return Path(shutil.copytree(capture, tmp_path / "broken"))


def config(capture: Path, out: Path, **more: Any) -> AlignConfig:
    losses = ["p-kl", "h-kl", "byte-prefix"]
    return AlignConfig(captures=[str(capture)], out=str(out), **{"student": "bytes", "losses": losses, **more})


def vanish(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    """One bit in the middle of the data, where nothing but a checksum sees it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def part(root: Path, index: int) -> Path:
    return root / "data" / f"part-{index:05d}.parquet"


DAMAGE = {"vanish": vanish, "truncate": truncate, "flip": flip}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_parts_are_named_and_the_others_done(
    damage: str, broken: Path, capture: Path, whole: Path, tmp_path: Path
) -> None:
    out, bad = tmp_path / "out", (0, 4)
    for index in bad:
        DAMAGE[damage](part(broken, index))
    with pytest.raises(IncompleteRun, match=r"(?s)2 of \d+ parts failed, .*part 0\b.*part 4\b.*--on-bad set-aside"):
        align(config(broken, out), Silent())
    assert not (out / MANIFEST).exists()
    done = set(files(whole)) - {part(broken, index).name for index in bad}
    assert set(files(out)) == done
    with pytest.raises(IncompleteRun, match=r"(?s)part 0\b.*part 4\b.*quarantined, and the targets are finished"):
        align(config(broken, out, on_bad="set-aside"), Silent())
    same_values(out, whole)
    set_aside(out, bad)
    for index in bad:
        shutil.copy(part(capture, index), part(broken, index))
    align(config(broken, out), Silent())
    assert set(files(out)) == set(files(whole))
    same_values(out, whole)
    verify(str(out))


def same_values(out: Path, whole: Path) -> None:
    """As readers see them: codes are counted from what could be read, and stay once a folder has them."""
    ours, theirs = (pa.Table.from_batches(iter_targets(str(root))) for root in (out, whole))
    theirs = theirs.filter(pc.is_in(theirs["sample_id"], ours["sample_id"].combine_chunks()))
    assert ours.num_rows
    assert ours.schema.names == theirs.schema.names
    for name in ours.schema.names:
        mine, other = (column.combine_chunks() for column in (ours[name], theirs[name]))
        if pa.types.is_list(mine.type):
            assert pc.list_value_length(mine).equals(pc.list_value_length(other)), name
            mine, other = mine.flatten(), other.flatten()
        np.testing.assert_array_equal(*(one.to_numpy(zero_copy_only=False) for one in (mine, other)), name)


def set_aside(out: Path, bad: tuple[int, ...]) -> None:
    """What the targets of such a run say of themselves, and that everything takes them."""
    manifest = read_manifest(str(out), TargetManifest)
    assert (manifest.schema_version, tuple(manifest.set_aside)) == (6, bad)
    assert not {found.index for found in manifest.parts} & set(bad)
    assert verify(str(out))["set_aside"] == list(bad)
    assert [int(index) for index in inspect(str(out))["provenance"]["set_aside"]] == list(bad)
    targets = Targets(str(out))
    targets.require("p-kl")
    assert len(targets.groups) > 0
    assert targets.samples == sum(found.samples for found in manifest.parts)


def test_a_set_aside_part_is_tried_again_and_may_stay_so(broken: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    vanish(part(broken, 2))
    words = ["align", broken, "--student", "bytes", "--for", "p-kl,h-kl,byte-prefix", "--out", out, "--json"]
    first = CliRunner().invoke(cli.app, [*map(str, words), "--on-bad", "set-aside"])
    said = json.loads(first.stdout)
    assert (first.exit_code, said["kind"]) == (4, "PartlyDone")
    assert list(said["set_aside"]) == ["part 2"]
    before = (out / MANIFEST).read_bytes()
    again = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert again.exit_code == 4, "a part that was accepted as missing is missed all the same"
    assert (out / MANIFEST).read_bytes() == before
    verify(str(out))


def test_a_capture_with_another_vocabulary_is_refused_before_any_work(broken: Path, tmp_path: Path) -> None:
    flip(broken / "vocab.parquet")
    with pytest.raises(VerificationError, match=r"vocab\.parquet has sha256 \w+, its manifest says"):
        align(config(broken, tmp_path / "out"), Silent())
    assert not (tmp_path / "out").exists()


def test_a_capture_whose_hashes_changed_is_another_run(broken: Path, tmp_path: Path) -> None:
    align(config(broken, tmp_path / "out"), Silent())
    manifest = read_manifest(str(broken), CaptureManifest)
    manifest.parts[0] = manifest.parts[0].model_copy(update={"sha256": "0" * 64})
    (broken / MANIFEST).write_text(manifest.model_dump_json())
    with pytest.raises(XtokenError, match=r"belongs to another align run \(capture: "):
        align(config(broken, tmp_path / "out"), Silent())


@pytest.fixture
def deaf(tokenizer_file: Callable[[str], Path], tmp_path: Path) -> Path:
    """SmolLM2's tokenizer, but it drops a character: a text that begins and ends with it cannot be placed."""
    data = json.loads(tokenizer_file("smollm2").read_text(encoding="utf-8"))
    dropped = {"type": "Split", "pattern": {"String": "¤"}, "behavior": "Removed", "invert": False}
    data["pre_tokenizer"]["pretokenizers"].insert(0, dropped)
    (tmp_path / "deaf").mkdir()
    path = tmp_path / "deaf" / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_samples_the_student_cannot_represent_are_named(
    deaf: Path, tokenizer_file: Callable[[str], Path], tmp_path: Path
) -> None:
    texts = [f"¤ {n} strange ¤" if n % 3 == 1 else f"document {n}: plain words\n" * 20 for n in range(8)]
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    Run(settings(corpus, tokenizer_file("smollm2"), tmp_path / "c", shard_bytes=1000), tmp_path).finish()
    out, student = tmp_path / "out", {"student": str(deaf)}
    with pytest.raises(IncompleteRun, match=r"cannot represent 3 samples \('.*#0', '.*#0', '.*#0'\), which .*skipped"):
        align(config(tmp_path / "c", out, **student), Silent())
    assert not (out / MANIFEST).exists()
    manifest = align(config(tmp_path / "c", out, on_bad="set-aside", **student), Silent())
    assert (manifest.schema_version, manifest.set_aside) == (6, {})
    missing = sorted(set(sample_ids(tmp_path / "c")) - set(sample_ids(out)))
    assert len(missing) == 3
    named = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["sample_id"] for line in named) == missing
    assert sum(found.counts["samples_skipped"] for found in manifest.parts) == 3
    assert verify(str(out))["samples"] == 5
    assert align(config(tmp_path / "c", out, **student), Silent()) == manifest, "it is finished"
