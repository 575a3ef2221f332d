"""precompute from the outside: results, resuming, and what it refuses before any work."""

import importlib
import json
import resource
import shutil
from pathlib import Path

import pytest

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.executors.protocol import Event, Lease
from xtoken.pipeline.store.files import DiskFull
from xtoken.pipeline.store.publish import committed, data_name
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import IncompleteRun, VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

# The package exports the function under the module's name.
module = importlib.import_module("xtoken.pipeline.capture.precompute")
TEXTS = [f"Document {number}: " + "some words, and 1234 numbers. " * (number + 3) for number in range(12)]
TEXTS[7] *= 5
HERE = pytest.mark.usefixtures("one_worker_is_here")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "corpus.jsonl"),
        teacher="bytes",
        out=str(tmp_path / "out"),
        backend="fake",
        k=8,
        max_tokens=64,
        shard_bytes=700,
        batch_tokens=512,
    )


class Told:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.labels, self.done, self.total = [], 0, None

    def start(self, label, total, unit, done=0):  # noqa: ARG002
        self.labels.append(label)
        self.done, self.total = done, total

    def note(self, text: str) -> None: ...

    def advance(self, amount, **figures):  # noqa: ARG002
        self.done += amount

    def finish(self):
        pass


class Poisoned:
    """An executor in this process to which shard 2 is poison."""

    def run(self, job, shards, watch):
        def send(message):
            if message.kind == "part":
                watch.see(Event("part", shard=message.shard, part=message.part))

        job.open().serve((Lease(shard) for shard in shards if shard != 2), send)
        return {2: "it tastes bad"}


@pytest.mark.parametrize("dry", [False, True])
def test_nothing_is_written_where_the_corpus_lies(config, tmp_path, dry):
    def refused(**changes):
        changed = config.changed(dry_run=dry, **changes)
        with pytest.raises(XtokenError) as error:
            (dry_run if dry else precompute)(changed, Silent())
        return str(error.value)

    assert "--out" in refused(corpus=str(tmp_path))
    assert "--log" in refused(corpus=str(tmp_path), out=str(tmp_path) + "-out", log=str(tmp_path / "log.jsonl"))
    assert "--log" in refused(log=config.corpus.corpus)
    assert "the capture's own files" in refused(corpus=f"{config.out}/data/a.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def files(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(out) / "data").iterdir())}


def test_a_run_from_nothing_to_a_manifest(config):
    progress = Told()
    manifest = precompute(config, progress)
    assert manifest == read_manifest(config.out, CaptureManifest)
    assert verify(config.out)["text_bytes"] == sum(len(text) for text in TEXTS)
    assert [part.index for part in manifest.parts] == list(range(len(manifest.parts)))
    assert len(manifest.parts) > 3
    assert progress.labels == ["plan", "precompute"]
    assert progress.done == progress.total == manifest.corpus.text_bytes
    assert manifest.teacher.backend == "fake"
    assert not manifest.bos
    assert manifest.corpus.documents == 12


def test_two_workers_write_the_same_bytes(config, tmp_path):
    one = precompute(config, Silent())
    other = config.changed(out=str(tmp_path / "other"), workers=2)
    two = precompute(other, Silent())
    assert files(config.out) == files(other.out)
    assert (one.parts, one.run_hash, one.plan_hash) == (two.parts, two.run_hash, two.plan_hash)


@HERE
def test_a_finished_run_does_nothing_again_and_needs_no_corpus(config, monkeypatch):
    manifest = precompute(config, Silent())
    Path(config.corpus.corpus).unlink()
    monkeypatch.setattr(module, "LocalExecutor", None)
    before = (Path(config.out) / "manifest.json").stat().st_mtime_ns
    progress = Told()
    assert precompute(config, progress) == manifest
    assert progress.labels == [f"{config.out} is complete, nothing to do"]
    assert (Path(config.out) / "manifest.json").stat().st_mtime_ns == before


@HERE
def test_only_what_is_missing_is_run(config):
    manifest = precompute(config, Silent())
    whole = files(config.out)
    (Path(config.out) / "manifest.json").unlink()
    for index in (1, 2):
        (Path(config.out) / "commits" / f"part-0000{index}.json").unlink()
    (Path(config.out) / data_name(2)).unlink()
    kept = (Path(config.out) / data_name(0)).stat().st_mtime_ns
    (Path(config.out) / "data" / "part-00001.dead.tmp").write_bytes(b"x")
    again = precompute(config, Silent())
    assert again.parts == manifest.parts
    assert files(config.out) == whole
    assert (Path(config.out) / data_name(0)).stat().st_mtime_ns == kept


CHANGES = {
    "k": (9, "k: 8 there, 9 now"),
    "min_p": (0.1, "min_p: 0.003 there, 0.1 now"),
    "max_tokens": (32, "max_tokens: 64 there, 32 now"),
    "text": (False, "text: True there, False now"),
    "student": ("bytes", "student_hash: None there"),
    "temperatures": ([2.0], r"temperatures: None there, \[2\.0\] now"),
    "shard_bytes": (900, "shard_bytes: 700 there, 900 now"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_runs_folder_is_refused_with_what_differs(config, name, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_: {})
    monkeypatch.setattr(module, "_finish", lambda *_: None)
    precompute(config, Silent())
    value, message = CHANGES[name]
    with pytest.raises(XtokenError, match=message):
        precompute(config.changed(**{name: value}), Silent())


def test_a_folder_of_something_else_is_refused(config):
    out = Path(config.out)
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(XtokenError, match=r"holds 'config\.json' but no capture"):
        precompute(config, Silent())


@HERE
def test_a_run_that_failed_before_its_first_commit_leaves_the_folder_free(config, tokenizer_file):
    # the fake teacher takes any tokenizer; the hf one finds no model beside this tokenizer.json
    wrong = config.changed(backend="hf", teacher=str(tokenizer_file("smollm2")))
    with pytest.raises(XtokenError):
        precompute(wrong, Silent())
    assert {path.name for path in Path(config.out).iterdir()} == {"log.jsonl", "status.json"}, "only what tells of it"
    precompute(config, Silent())
    verify(config.out)


@pytest.mark.parametrize("was_there", [False, True])
def test_a_run_that_is_refused_while_it_plans_leaves_no_folder_that_was_not_there(config, smollm2_dir, was_there):
    out = Path(config.out)
    if was_there:
        out.mkdir()
    with pytest.raises(XtokenError, match="it has no 'messages'"):
        precompute(config.changed(form="messages", teacher=str(smollm2_dir)), Silent())
    assert out.exists() is was_there
    assert not was_there or not list(out.iterdir())


def test_k_larger_than_the_vocabulary_is_refused_first(config, tmp_path, tokenizer_file):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    small = Tokenizer(models.BPE({char: at for at, char in enumerate(pre_tokenizers.ByteLevel.alphabet()[:200])}, []))
    small.pre_tokenizer, small.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    small.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(XtokenError):  # too few bytes to rejoin a canary, or k too large
        precompute(config.changed(teacher=str(tmp_path / "tokenizer.json"), k=201), Silent())
    assert not Path(config.out).exists()


def test_memory_is_not_shared_with_workers(config):
    with pytest.raises(XtokenError, match="memory://"):
        precompute(config.model_copy(update={"out": "memory://x/out"}), Silent())


@HERE
def test_a_vanished_corpus_is_named_and_bringing_it_back_resumes(config, tmp_path):
    precompute(config, Silent())
    (Path(config.out) / "commits" / "part-00001.json").unlink()
    away = shutil.move(config.corpus.corpus, tmp_path / "away.jsonl")
    with pytest.raises(XtokenError, match=r"corpus\.jsonl"):
        precompute(config, Silent())
    shutil.move(away, config.corpus.corpus)
    precompute(config, Silent())
    verify(config.out)


@HERE
def test_a_commit_without_its_file_is_named(config):
    precompute(config, Silent())
    (Path(config.out) / data_name(1)).unlink()
    with pytest.raises(VerificationError, match=r"part-00001\.parquet has None bytes.*remove commits/part-00001\.json"):
        precompute(config, Silent())


@HERE
def test_a_shard_that_keeps_failing_is_quarantined_and_tried_again_by_a_rerun(config):
    with pytest.raises(IncompleteRun, match=r"1 of \d+ shards were quarantined after three attempts") as caught:
        precompute(config, Silent(), executor=Poisoned())
    assert "shard 2: it tastes bad" in str(caught.value)
    partial = read_manifest(config.out, CaptureManifest)
    assert partial.set_aside == {2: "it tastes bad"}
    assert verify(config.out)["set_aside"] == [2]
    again = precompute(config, Silent())
    assert [part for part in again.parts if part.index != 2] == partial.parts
    assert again.set_aside == {}
    verify(config.out)


def test_a_full_disk_stops_the_run_and_the_same_command_resumes(config):
    undisturbed = precompute(config.model_copy(update={"out": config.out + "-undisturbed"}), Silent())
    sizes = [part.file_bytes for part in undisturbed.parts]
    largest = sizes.index(max(sizes))
    assert largest > 0
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    # worker processes inherit the limit: a part larger than it meets the error of a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes[:largest]) + 10, old[1]))
    try:
        with pytest.raises(DiskFull, match="free some space and run the same command again"):
            precompute(config, Silent())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert largest not in committed(config.out)
    # the shards before it; one or two after it may have been quicker than the end of the run
    assert set(range(largest)) <= set(committed(config.out))
    assert {path.suffix for path in (Path(config.out) / "data").iterdir()} == {".parquet"}
    assert precompute(config, Silent()).parts == undisturbed.parts


@HERE
def test_cells_share_the_shards_and_whoever_has_none_seals(config):
    undisturbed = precompute(config.model_copy(update={"out": config.out + "-undisturbed"}), Silent())
    count = len(undisturbed.parts)
    assert precompute(config.changed(cell="2/2"), Silent()) is None
    assert sorted(committed(config.out)) == list(range(1, count, 2))
    assert not (Path(config.out) / "manifest.json").exists()
    # what a worker of another cell is writing is left alone
    theirs = [Path(config.out) / "data" / "part-00001.abc.tmp", Path(config.out) / "data" / "part-00000.abc.tmp"]
    for path in theirs:
        path.write_bytes(b"x")
    precompute(config.changed(cell="1/2"), Silent())
    assert [path.exists() for path in theirs] == [True, False]
    sealed = precompute(config, Silent())
    assert sealed is not None
    assert sealed.parts == undisturbed.parts
    assert files(config.out) == files(config.out + "-undisturbed")
    verify(config.out)


def test_a_quarantined_shard_is_told_by_its_last_line():
    """A defect of an engine comes as a traceback, which the manifest holds; people are told one line."""
    said = module._incomplete({3: "Traceback (most recent call last):\n  File x\nKeyError: 'why'"}, 7, "out")
    assert "  shard 3: KeyError: 'why'\n" in said
    assert "Traceback" not in said
