"""Audits in a capture's manifest: what verify, inspect and the card say of them, and that copies keep them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from xtoken.pipeline.share.card.card import card_files
from xtoken.pipeline.share.merge import merge
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.figures import audits_line, capture_figures
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.seal import seal
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.share import MergeConfig, PullConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import AuditRecord, CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "captures"
SETTINGS = {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.8, "prefix_caching": False, "runner": "v1"}
WORSE = {
    "method": "hf",
    "against": "transformers 9.9, float32 on cpu",
    "capture_path": "fake",
    "samples": 3,
    "rows": 300,
    "realised_mean": 0.0123456789,
    "realised_p99": 0.2,
    "realised_max": 1.5,
    "entries_mean": 0.01,
    "entries_max": 0.9,
    "same_top1": 0.97,
    "ids_in_common": 0.88,
    "kl_mean": 0.002,
}


def manifest_of(root: Path) -> CaptureManifest:
    return read_manifest(str(root), CaptureManifest)


def changed(root: Path, **changes: Any) -> Path:
    """Another manifest in a sealed capture."""
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    seal(str(root))
    return root


@pytest.fixture
def two_audits(tmp_path: Path) -> Path:
    """A capture with a worker's audit by the second path and another one's by transformers."""
    root = Path(shutil.copytree(GOLDEN / "v3-topk", tmp_path / "capture"))
    first = json.loads((root / "manifest.json").read_text())["audits"]
    return changed(root, audits=[*first, WORSE])


def test_verify_shows_a_row_per_audit_and_the_worst_on_top(two_audits: Path) -> None:
    plain, found = verify(str(two_audits)), verify(str(two_audits), audit=True)
    worst, rows = found.pop("worst_of_audits"), found.pop("audits")
    assert found == plain
    assert [row["scored_by"] for row in rows] == [WORSE["against"], "fake's second path (1)"]
    names = ("rows", "realised_max", "entries_mean", "same_top1", "ids_in_common", "kl_mean")
    shown = {"scored_by": WORSE["against"], "realised_mean": 0.012, **{name: WORSE[name] for name in names}}
    assert rows[0] == shown
    assert (worst["realised_max"], worst["realised_mean"]) == (1.5, 0.012)
    assert (worst["same_top1"], worst["ids_in_common"]) == (0.97, 0.88), "the worst share is the smallest"
    assert "rows" not in worst
    assert "entropy_mean" not in worst


def test_verify_says_how_to_get_audits_where_there_are_none(kept_capture: Path) -> None:
    assert verify(str(kept_capture), audit=True)["audits"].startswith("none: ")
    assert "--audit hf" in verify(str(kept_capture), audit=True)["audits"]
    with pytest.raises(XtokenError, match=r"holds targets, and only a capture has audits; leave --audit out"):
        verify(str(GOLDEN / "v3-targets"), audit=True)


def test_a_forged_audit_is_found(two_audits: Path) -> None:
    path = two_audits / "manifest.json"
    path.write_text(path.read_text().replace('"realised_max": 1.5', '"realised_max": 0.1'))
    with pytest.raises(VerificationError, match=r"manifest\.json: sha256"):
        verify(str(two_audits), audit=True)


def test_inspect_counts_them(two_audits: Path, kept_capture: Path) -> None:
    found = inspect(str(two_audits))
    assert found["audits"] == {"count": 2, "worst_realised_difference": 1.5}
    assert "audits" not in found["provenance"]
    assert found["provenance"]["engine_settings"] == SETTINGS
    assert inspect(str(kept_capture))["audits"] == {"count": 0}


def test_figures_and_card_have_one_line(two_audits: Path, kept_capture: Path) -> None:
    manifest = manifest_of(two_audits)
    line = capture_figures(manifest)["audits"]
    assert line.startswith("377 rows scored again by fake's second path (1), transformers 9.9, float32 on cpu; in the")
    assert "differ by 0.012 nats on average, at most by 1.5, the most probable token is the same in 97.0%" in line
    assert "audits" not in capture_figures(manifest_of(kept_capture))
    licenses = {"corpus": "mit", "outputs": "mit"}
    readme = card_files(str(two_audits), manifest, licenses, None)["README.md"].decode()
    assert "* **Audited**: 377 rows scored again by `fake's second path (1)`, `transformers 9.9" in readme
    assert (
        "Audited" not in card_files(str(kept_capture), manifest_of(kept_capture), licenses, None)["README.md"].decode()
    )


def test_words_of_strangers_stand_as_code(two_audits: Path) -> None:
    audit = AuditRecord.model_validate({**WORSE, "against": "[x](http://y) `<script>`"})
    manifest = manifest_of(two_audits).model_copy(update={"audits": [audit]})
    licenses = {"corpus": "mit", "outputs": "mit"}
    readme = card_files(str(two_audits), manifest, licenses, None)["README.md"].decode()
    assert "scored again by `[x](http://y) '<script>'`;" in readme


def test_draws_have_no_top1() -> None:
    audits = manifest_of(GOLDEN / "v3-sampled").audits
    assert "most probable" not in audits_line(audits)
    assert verify(str(GOLDEN / "v3-sampled"), audit=True)["worst_of_audits"]["entropy_max"] < 1e-4


def test_a_subset_keeps_them(two_audits: Path, tmp_path: Path) -> None:
    source = manifest_of(two_audits)
    for name, options in (("parts", {"parts": "1"}), ("bare", {"columns": ["none"]}), ("where", {"where": "complete"})):
        destination = tmp_path / name
        pull(PullConfig(source=str(two_audits), destination=str(destination), **options), Silent())
        verify(str(destination))
        found = manifest_of(destination)
        assert (found.audits, found.engine_settings) == (source.audits, SETTINGS)


def joined(tmp_path: Path, *sources: Path) -> CaptureManifest:
    destination = tmp_path / "joined"
    merge(MergeConfig(sources=[str(source) for source in sources], destination=str(destination)), Silent())
    verify(str(destination))
    return manifest_of(destination)


def test_a_merge_keeps_all_of_them_once(two_audits: Path, tmp_path: Path) -> None:
    other = changed(
        Path(shutil.copytree(GOLDEN / "v3-topk", tmp_path / "other")), engine_settings={**SETTINGS, "runner": "v2"}
    )
    found = joined(tmp_path, other, two_audits)
    assert found.audits == manifest_of(two_audits).audits, "the one that both have is there once"
    assert found.engine_settings == {name: value for name, value in SETTINGS.items() if name != "runner"}


@pytest.mark.parametrize("order", [1, -1])
def test_versions_2_and_3_of_one_plan_become_3(order: int, tmp_path: Path) -> None:
    found = joined(tmp_path, *[GOLDEN / "v2-topk", GOLDEN / "v3-topk"][::order])
    assert found.schema_version == 3
    assert found.audits == manifest_of(GOLDEN / "v3-topk").audits
    assert found.engine_settings == {}, "of the other it is not known"


def test_what_version_2_did_not_have_is_not_written_into_it(tmp_path: Path) -> None:
    pull(PullConfig(source=str(GOLDEN / "v2-topk"), destination=str(tmp_path / "some"), parts="0"), Silent())
    written = json.loads((tmp_path / "some" / "manifest.json").read_text())
    assert written["schema_version"] == 2
    assert set(written) == set(json.loads((GOLDEN / "v2-topk" / "manifest.json").read_text()))
    assert {"audits", "engine_settings"} <= set(json.loads(manifest_of(GOLDEN / "v3-topk").model_dump_json()))


def test_version_2_cannot_be_without_its_sums(tmp_path: Path) -> None:
    root = Path(shutil.copytree(GOLDEN / "v2-topk", tmp_path / "capture"))
    (root / "SHA256SUMS").unlink()
    with pytest.raises(VerificationError, match="SHA256SUMS is missing"):
        verify(str(root))


@pytest.mark.parametrize(
    "changes",
    [
        {"engine_settings": {"x" * 101: 1}},
        {"engine_settings": {str(number): 1 for number in range(257)}},
        {"engine_settings": {"x": [1]}},
        {"engine_settings": {"x": "y" * 4097}},
        {"audits": [{**WORSE, "same_top1": 1.01}]},
        {"audits": [{**WORSE, "realised_mean": -0.1}]},
        {"audits": [{**WORSE, "against": "x" * 1001}]},
        {"audits": [{**WORSE, "host": "a machine"}]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_no_engine_or_audit_says_is_refused(two_audits: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(XtokenError, match="does not follow the schema"):
        manifest_of(changed_unsealed(two_audits, **changes))


def changed_unsealed(root: Path, **changes: Any) -> Path:
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return root


def test_figures_that_are_no_numbers_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="finite"):
            AuditRecord.model_validate({**WORSE, "kl_mean": value})


def test_settings_keep_their_types(two_audits: Path) -> None:
    found = manifest_of(two_audits).engine_settings
    assert found == SETTINGS
    assert [type(value) for value in found.values()] == [int, float, bool, str]
