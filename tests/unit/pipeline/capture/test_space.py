"""``--space``: capture, targets and student count the same tokens as the beginning of a word."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.align import align
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.share.merge import merge
from xtoken.pipeline.store.reader import iter_capture, load_vocab
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.share import MergeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, parse_manifest, read_manifest
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.targets import Targets

pytestmark = pytest.mark.usefixtures("one_worker_is_here")

TOKENIZER = Path(__file__).parents[3] / "golden" / "captures" / "tiny"
TEXT = "The river runs past the old mill,\n\tand 27 boats wait for rain.\n" * 3


def capture(tmp_path: Path, name: str, **options: Any) -> str:
    corpus = tmp_path / f"{name}.txt"
    corpus.write_text(TEXT)
    out = str(tmp_path / name)
    config: dict[str, Any] = {"teacher": str(TOKENIZER), "backend": "fake", "k": 8, "max_tokens": 64, "out": out}
    precompute(PrecomputeConfig.from_flat(corpus=str(corpus), **(config | options)), Silent())
    return out


def aligned(root: str) -> str:
    align(AlignConfig(captures=[root], student=str(TOKENIZER), out=f"{root}-targets", losses=["alm"]), Silent())
    verify(f"{root}-targets")
    return f"{root}-targets"


def spaces(root: str) -> NDArray[np.float64]:
    return np.concatenate([value for batch in iter_capture(root) for value in batch["space_logprob"].to_pylist()])


@pytest.mark.thorough
def test_both_sides_count_the_same_tokens(tmp_path: Path) -> None:
    roots = {which: capture(tmp_path, which, space=which) for which in ("space", "paper")}
    for which, root in roots.items():
        verify(root)
        table, targets = load_vocab(root), Targets(aligned(root))
        assert targets.manifest.space == which
        np.testing.assert_array_equal(targets.vocab.space_V, table.word_starts(which))
        assert bool(targets.vocab.space_V[table.info.eos_id]) == (which == "paper")
    assert (spaces(roots["paper"]) > spaces(roots["space"])).all(), "more tokens have more mass"


@pytest.mark.thorough
def test_versions_and_names(tmp_path: Path) -> None:
    """What does not ask for the set of the paper is written as ever, for releases that do not know the field."""
    old, new = capture(tmp_path, "old"), capture(tmp_path, "new", space="paper")
    versions = {root: read_manifest(root, CaptureManifest).schema_version for root in (old, new)}
    assert versions == {old: 3, new: 5}
    for root in (aligned(old), aligned(new)):
        assert read_manifest(root, TargetManifest).schema_version == 6
    for root in (old, f"{old}-targets"):
        assert "space" not in json.loads(Path(root, "manifest.json").read_text())
    assert "space" not in json.loads(Path(old, "run.json").read_text())


def test_another_set_is_another_run(tmp_path: Path) -> None:
    capture(tmp_path, "one", space="paper")
    with pytest.raises(XtokenError, match=r"holds another run \(space: 'paper' there, 'space' now\)"):
        capture(tmp_path, "one")
    capture(tmp_path, "two")
    with pytest.raises(XtokenError, match=r"holds another run \(space: 'space' there, 'paper' now\)"):
        capture(tmp_path, "two", space="paper")


@pytest.mark.thorough
def test_captures_of_different_sets_are_not_merged(tmp_path: Path) -> None:
    roots = [capture(tmp_path, "one"), capture(tmp_path, "two", space="paper")]
    with pytest.raises(XtokenError, match="cannot be one capture: space is 'space' and 'paper'"):
        merge(MergeConfig(sources=roots, destination=str(tmp_path / "both")), Silent())


@pytest.mark.usefixtures("vllm_gives_the_top_k")
def test_an_engine_of_top_k_is_refused(tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"--space paper .* backend 'vllm' gives only the top k; use --backend hf"):
        capture(tmp_path, "one", space="paper", backend="vllm")


def test_an_older_version_does_not_know_the_set(tmp_path: Path) -> None:
    root = capture(tmp_path, "one", space="paper")
    manifest = json.loads(Path(root, "manifest.json").read_text()) | {"schema_version": 4}
    with pytest.raises(XtokenError, match="space is another than ' ', which version 4 does not know"):
        parse_manifest(json.dumps(manifest).encode(), "manifest.json")
