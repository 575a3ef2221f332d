"""Align end to end: targets of a small capture, resumed, refused, and complete on their own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.align import align
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.project import project
from xtoken.pipeline.store.reader import iter_targets
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig, ProjectConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import IncompleteRun, XtokenError
from xtoken.schemas.manifest import MANIFEST, CaptureManifest, TargetManifest, content_hash, read_manifest
from xtoken.schemas.tables import targets
from xtoken.schemas.ui.progress import Silent

TEXT = "Größe 12345 — привет, мир! 東京タワー 👩\u200d👧 def f(x): return x ** 2\r\n\n"


@pytest.fixture(scope="module")
def teacher(tokenizer_file: Callable[[str], Path]) -> str:
    return str(tokenizer_file("smollm2"))


@pytest.fixture(scope="module")
def capture(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("align")
    (root / "text").mkdir()
    for name in "abcd":
        (root / "text" / f"{name}.txt").write_text(f"{name}: " + TEXT * 5, encoding="utf-8")
    precompute(_precompute(teacher, root), Silent())
    return root / "c"


def _precompute(teacher: str, root: Path, **options: Any) -> PrecomputeConfig:
    fixed = {"backend": "fake", "k": 24, "max_tokens": 64, "shard_bytes": 700}
    return PrecomputeConfig.from_flat(
        corpus=str(root / "text"), teacher=teacher, out=str(root / "c"), **fixed, **options
    )


def _config(capture: Path, out: Path, **options: Any) -> AlignConfig:
    return AlignConfig(captures=[str(capture)], out=str(out), **{"student": "bytes", **options})


def _files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.parquet")}


class _KilledAfter(Silent):
    """Raises Ctrl-C when the first part of the run is done."""

    def __init__(self) -> None:
        self.parts = 0

    def note(self, text: str) -> None: ...

    def advance(self, amount: int, **figures: float | str) -> None:
        assert amount >= 0
        self.parts += bool(figures)
        if self.parts == 1:
            raise KeyboardInterrupt


def test_targets_explain_themselves(capture: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    manifest = align(_config(capture, out, losses=["p-kl", "h-kl"]), Silent())
    assert read_manifest(str(out), TargetManifest) == manifest
    assert manifest.capture_hash == content_hash(read_manifest(str(capture), CaptureManifest))
    assert len(manifest.parts) > 1
    found = verify(str(out))
    assert found["samples"] == sum(part.samples for part in read_manifest(str(capture), CaptureManifest).parts)
    assert pq.read_schema(out / "data" / "part-00000.parquet").equals(targets(["p-kl", "h-kl"], 6))
    table = pa.Table.from_batches(iter_targets(str(out)))
    assert table.schema.equals(targets(["p-kl", "h-kl"]))
    text = {row["sample_id"]: row["text"] for row in pq.read_table(capture / "data").to_pylist()}
    for row in table.to_pylist():
        assert bytes(row["student_ids"]) == text[row["sample_id"]].encode()
    assert sum(part.counts["chunks"] for part in manifest.parts) == sum(part.entries for part in manifest.parts)


def test_interrupted_and_resumed_gives_the_same_files(capture: Path, tmp_path: Path) -> None:
    align(_config(capture, tmp_path / "whole"), Silent())
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        align(_config(capture, out), _KilledAfter())
    assert not (out / MANIFEST).exists()
    kept = list((out / "commits").iterdir())
    assert kept
    resumed = align(_config(capture, out), Silent())
    assert _files(out) == _files(tmp_path / "whole")
    assert resumed.run_hash == read_manifest(str(tmp_path / "whole"), TargetManifest).run_hash
    assert not list(out.rglob("*.tmp"))
    assert align(_config(capture, out), Silent()) == resumed


def test_only_the_losses_asked_for(capture: Path, tmp_path: Path) -> None:
    manifest = align(_config(capture, tmp_path / "t", losses=["ce"]), Silent())
    assert manifest.losses == ["ce"]
    assert pq.read_schema(tmp_path / "t" / "data" / "part-00000.parquet").equals(targets(["ce"]))


@pytest.mark.parametrize("merge", ["first", "last", "mean"])
def test_every_loss_at_another_temperature(teacher: str, tmp_path: Path, merge: str) -> None:
    """All losses a merge knows, REST at tau from the capture; the manifest says how they were built."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    precompute(_precompute(teacher, tmp_path, temperatures=[0.5, 2.0]), Silent())
    known = {"last": ["ce", "gold", "uld", "alm"], "mean": ["ce", "p-kl", "h-kl", "alm"]}
    losses = known.get(merge, ["ce", "p-kl", "h-kl", "gold", "uld", "alm", "strict", "byte-prefix"])
    options = {"losses": losses, "merge": merge, "tau": 2.0}
    manifest = align(_config(tmp_path / "c", tmp_path / "t", **options), Silent())
    assert (manifest.losses, manifest.merge, manifest.tau) == (losses, merge, 2.0)
    found = verify(str(tmp_path / "t"))
    assert found["samples"] == sum(part.samples for part in manifest.parts) > 0
    table = pa.Table.from_batches(iter_targets(str(tmp_path / "t")))
    assert table.schema.equals(targets(losses))
    spaces = [value for row in table["alm_space_logprob"].to_pylist() for value in row]
    assert sum(part.counts["space_chunks"] for part in manifest.parts) == sum(value == value for value in spaces) > 0


def test_sparse_kl_needs_the_same_tokenizer(capture: Path, teacher: str, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"student's tokenizer .* is not the teacher's, .* take --for p-kl"):
        align(_config(capture, tmp_path / "t", losses=["sparse-kl"]), Silent())
    assert not (tmp_path / "t").exists()
    align(_config(capture, tmp_path / "t", losses=["sparse-kl"], student=teacher), Silent())
    assert verify(str(tmp_path / "t"))["samples"] > 0


@pytest.mark.parametrize(
    ("losses", "merge"),
    [
        (["h-kl"], "first"),
        (["mined"], "first"),
        (["gold"], "last"),
        (["uld"], "first"),
        (["byte-prefix"], "first"),
        (["p-kl"], "mean"),
    ],
)
def test_a_temperature_without_its_rest_is_refused(
    capture: Path, tmp_path: Path, losses: list[str], merge: str
) -> None:
    with pytest.raises(XtokenError, match=rf"{losses[0]}.* at --tau 2 needs .* capture again with --temperatures 2"):
        align(_config(capture, tmp_path / "t", losses=losses, merge=merge, tau=2.0), Silent())
    assert not (tmp_path / "t").exists()


def test_p_kl_does_without_rest_at_a_temperature(capture: Path, tmp_path: Path) -> None:
    align(_config(capture, tmp_path / "t", losses=["ce", "p-kl", "alm"], tau=2.0), Silent())
    rests = [
        rest
        for row in pa.Table.from_batches(iter_targets(str(tmp_path / "t")))["pkl_rest_logprob"].to_pylist()
        for rest in row
    ]
    assert sum(rest != rest for rest in rests) > len(rests) / 2


def test_another_run_in_the_folder_is_refused(capture: Path, tmp_path: Path) -> None:
    align(_config(capture, tmp_path / "t"), Silent())
    with pytest.raises(XtokenError, match=r"unreached: prefix there, rest now"):
        align(_config(capture, tmp_path / "t", unreached="rest"), Silent())
    with pytest.raises(XtokenError, match=r"merge: first there, mean now; tau: 1.0 there, 2.5 now"):
        align(_config(capture, tmp_path / "t", losses=["ce"], merge="mean", tau=2.5), Silent())
    with pytest.raises(XtokenError, match="no align run wrote"):
        align(_config(capture, capture), Silent())


def test_given_w_is_used_and_checked(capture: Path, teacher: str, tmp_path: Path) -> None:
    fits, reverse = str(tmp_path / "w"), str(tmp_path / "r")
    project(ProjectConfig(student="bytes", teacher=str(capture), out=fits), Silent())
    project(ProjectConfig(student=teacher, teacher="bytes", out=reverse), Silent())
    manifest = align(_config(capture, tmp_path / "t", w=fits), Silent())
    assert manifest.w_hash == align(_config(capture, tmp_path / "u"), Silent()).w_hash
    assert (tmp_path / "t" / "w.parquet").read_bytes() == (Path(fits) / "w.parquet").read_bytes()
    with pytest.raises(XtokenError, match=r"student tokenizer .* is not the one W was built for"):
        align(_config(capture, tmp_path / "v", w=reverse), Silent())


@pytest.fixture
def textless(teacher: str, capture: Path, tmp_path: Path) -> Path:
    """The same capture without its text; its corpus lies beside it."""
    shutil.copytree(capture.parent / "text", tmp_path / "text")
    precompute(_precompute(teacher, tmp_path, text=False), Silent())
    return tmp_path / "c"


def test_a_capture_without_text_needs_its_corpus(capture: Path, textless: Path, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"--no-text, .* with --corpus"):
        align(_config(textless, tmp_path / "t"), Silent())
    align(_config(textless, tmp_path / "t", corpus=str(tmp_path / "text")), Silent())
    align(_config(capture, tmp_path / "whole"), Silent())
    assert _files(tmp_path / "t") == _files(tmp_path / "whole")


def test_another_corpus_is_refused(textless: Path, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"corpus .* does not exist"):
        align(_config(textless, tmp_path / "t", corpus=str(tmp_path / "nothing")), Silent())
    changed = tmp_path / "text" / "b.txt"
    changed.write_text(changed.read_text(encoding="utf-8").replace("12345", "54321"), encoding="utf-8")
    with pytest.raises(XtokenError, match="holds other documents than when it was planned"):
        align(_config(textless, tmp_path / "t", corpus=str(tmp_path / "text")), Silent())


def test_too_little_memory_is_named(capture: Path, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match="--memory-limit 100KB"):
        align(_config(capture, tmp_path / "t", memory_limit="100KB"), Silent())


def test_a_vanished_part_fails_alone(capture: Path, tmp_path: Path) -> None:
    broken = tmp_path / "c"
    shutil.copytree(capture, broken)
    (broken / "data" / "part-00001.parquet").rename(tmp_path / "aside.parquet")
    with pytest.raises(IncompleteRun, match=r"part 1\b.*xtoken verify"):
        align(_config(broken, tmp_path / "t"), Silent())
    (tmp_path / "aside.parquet").rename(broken / "data" / "part-00001.parquet")
    align(_config(broken, tmp_path / "t"), Silent())
    assert verify(str(tmp_path / "t"))["parts"] > 1


def test_a_capture_with_a_shard_set_aside_is_aligned_without_it(capture: Path, tmp_path: Path) -> None:
    whole = read_manifest(str(capture), CaptureManifest)
    shutil.copytree(capture, tmp_path / "c")
    partial = whole.model_copy(update={"set_aside": {1: "poison"}, "parts": [p for p in whole.parts if p.index != 1]})
    (tmp_path / "c" / MANIFEST).write_text(partial.model_dump_json(), encoding="utf-8")
    found = align(_config(tmp_path / "c", tmp_path / "t"), Silent())
    assert [part.index for part in found.parts] == [part.index for part in whole.parts if part.index != 1]


def test_an_unfinished_capture_is_refused(capture: Path, tmp_path: Path) -> None:
    shutil.copytree(capture, tmp_path / "c", ignore=shutil.ignore_patterns(MANIFEST))
    with pytest.raises(XtokenError, match="is not a finished artifact"):
        align(_config(tmp_path / "c", tmp_path / "t"), Silent())
