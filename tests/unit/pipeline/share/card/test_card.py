"""The dataset card: figures against sums of our own, hub metadata, names of strangers, the same bytes twice."""

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from xtoken.pipeline.share.card.alignment import alignments
from xtoken.pipeline.share.card.card import card_files, size_category, write_card
from xtoken.pipeline.share.card.markup import HUB_LICENSES, code, latex, license_fields, one_line, plain, public
from xtoken.pipeline.share.card.plots import PLOTS
from xtoken.pipeline.share.card.stats import read_stats
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.row_stats import RowStats, quantile
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.seal import PLOTS as SEALED_PLOTS
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.share import CardConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import MANIFEST, CaptureManifest, CodecInfo, content_hash, read_manifest
from xtoken.schemas.ui.progress import Silent

GOLDEN = Path(__file__).parents[4] / "golden" / "captures"
LICENSES = {"corpus": "cc-by-4.0", "outputs": "gemma"}
FLAGS = ["corpus=cc-by-4.0", "outputs=gemma"]
HOSTILE = (
    "x`</code><script>alert(1)</script>` ![a](http://evil.example/a.png) [b](javascript:1) | c |\n---\n# head\n"
    'license: mit\n```\n<img src=x onerror=1> {% raw %} $title www.evil.example \u202e"\\end{document}'
)


@pytest.fixture(scope="module")
def sampled(small_capture: Callable[..., Path]) -> Path:
    """Draws of the fake teacher, without the text."""
    text = "The quick brown fox, 12345 jumps; naïve café. " * 12
    return small_capture({"a.txt": text}, codec="sampled", draws=20, text=False)


def _manifest(root: Path) -> CaptureManifest:
    return read_manifest(str(root), CaptureManifest)


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _readme(root: Path, **changes: Any) -> str:
    manifest = _manifest(root).model_copy(update=changes)
    return card_files(str(root), manifest, LICENSES, None)["README.md"].decode()


def _stats(root: Path) -> RowStats:
    return read_stats(str(root), _manifest(root), Silent())


def _rows(root: Path) -> list[dict[str, Any]]:
    """Every row of a capture in plain Python: kept ids, log-probabilities, REST, the text's token and its own."""
    step, found = _manifest(root).codec.step, []
    for sample in (sample for batch in iter_capture(str(root)) for sample in batch.to_pylist()):
        start = 0
        for row, kept in enumerate(sample["kept"]):
            gaps, ids = (sample[name][start : start + kept] for name in ("topk_gap", "topk_ids"))
            gap, start = sample["rest_gap"][row], start + kept
            token = sample["teacher_ids"][sample["first_row"] + row]
            logprob = [-step * sum(gaps[: rank + 1]) for rank in range(kept)]
            rest = 0.0 if gap == 65535 else math.exp(-step * gap)
            found.append({"ids": ids, "logprob": logprob, "rest": rest, "token": token})
    return found


@pytest.mark.parametrize("name", ["made now", "v1-topk"])
def test_figures_are_those_of_the_rows(name: str, kept_capture: Path) -> None:
    root = kept_capture if name == "made now" else GOLDEN / name
    rows, stats = _rows(root), _stats(root)
    rests = np.array([row["rest"] for row in rows])
    assert stats.rows == len(rows) > 50
    assert stats.tail_moment(1) == pytest.approx(rests.mean())
    assert stats.tail_moment(2) == pytest.approx((rests**2).mean())
    for share in (0.5, 0.9, 0.99):
        expected = np.quantile(rests, share, method="inverted_cdf")
        assert stats.tail_quantile(share) == pytest.approx(expected)
    entropy = [
        -sum(math.exp(value) * value for value in row["logprob"])
        - (row["rest"] and row["rest"] * math.log(row["rest"]))
        for row in rows
    ]
    assert stats.entropy_nats == pytest.approx(sum(entropy))
    assert stats.entropy.sum() == stats.entries.sum() == len(rows)
    ranks = [row["ids"].index(row["token"]) for row in rows if row["token"] in row["ids"]]
    assert name == "made now" or 0 < len(ranks) < len(rows)
    assert stats.share_within(1) == pytest.approx(ranks.count(0) / len(rows))
    assert stats.share_within(256) == pytest.approx(len(ranks) / len(rows))


def test_bits_per_byte_leave_out_a_first_token_without_a_row(kept_capture: Path) -> None:
    samples = [sample for batch in iter_capture(str(kept_capture)) for sample in batch.to_pylist()]
    assert {sample["first_row"] for sample in samples} == {1}
    predicted = sum(sample["teacher_end"][-1] - sample["teacher_end"][0] for sample in samples)
    nats = -sum(sum(sample["realised_logprob"]) for sample in samples)
    assert _stats(kept_capture).bits_per_byte == pytest.approx(nats / math.log(2) / predicted)


def test_draws(sampled: Path) -> None:
    samples = [sample for batch in iter_capture(str(sampled)) for sample in batch.to_pylist()]
    stats, drawn = _stats(sampled), [count for sample in samples for count in sample["drawn"]]
    assert np.array_equal(stats.entries[:21], np.bincount(drawn, minlength=21))
    assert stats.entropy_nats == pytest.approx(sum(sum(sample["entropy"]) for sample in samples))
    assert not stats.tail.any()
    files = card_files(str(sampled), _manifest(sampled), LICENSES, None)
    readme = files["README.md"].decode()
    assert set(files) == {"README.md", *PLOTS} - {"plots/mass-kept.png"}
    for words in ("20 tokens by systematic sampling", "draw_codes", "The text is not included", "--corpus CORPUS"):
        assert words in readme
    assert "topk_gap" not in readme


def test_front_matter_is_what_the_hub_reads(kept_capture: Path) -> None:
    card = DatasetCard(_readme(kept_capture))
    assert card.data.license == "other"
    assert card.data.to_dict()["license_name"] == "corpus-cc-by-4.0-outputs-gemma"
    assert card.data.size_categories == ["n<1K"]
    assert card.data.task_categories == ["text-generation"]
    configs = {one["config_name"]: one["data_files"] for one in card.data.to_dict()["configs"]}
    assert configs["default"] == [{"split": "train", "path": "data/*.parquet"}]
    assert configs["vocab"] == [{"split": "train", "path": "vocab.parquet"}]
    assert yaml.safe_load(card.content.split("---")[1]) == {**card.data.to_dict()}


def test_licences() -> None:
    same = {"corpus": "CC-BY-4.0", "outputs": "cc-by-4.0"}
    assert license_fields(same) == {"license": "cc-by-4.0"}
    assert license_fields({"corpus": "my own", "outputs": "https://example.org/terms"}) == {
        "license": "other",
        "license_name": "corpus-my-own-outputs-example.org-terms",
        "license_link": "https://example.org/terms",
    }
    assert license_fields({"corpus": "other", "outputs": "other"})["license"] == "other"
    assert {"mit", "gemma", "llama3.1", "cc-by-sa-4.0"} <= HUB_LICENSES


@pytest.mark.parametrize(
    ("samples", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (123_456, "100K<n<1M"), (10**12, "n>1T"), (10**15, "n>1T")],
)
def test_size_categories(samples: int, category: str) -> None:
    assert size_category(samples) == category


def test_what_the_card_says(kept_capture: Path) -> None:
    manifest, readme = _manifest(kept_capture), _readme(kept_capture)
    assert content_hash(manifest) in readme
    for words in (
        "`fake`",
        "at most 16",
        "`cc-by-4.0`",
        "`gemma`",
        "the teacher's own terms",
        "sha256sum -c SHA256SUMS",
    ):
        assert words in readme
    assert str(kept_capture.parent) not in readme, "a folder of the writer's machine"
    counts = [part.counts for part in manifest.parts]
    share = sum(count["chunks_1_1"] for count in counts) / sum(count["chunks"] for count in counts)
    assert f"| given when it was captured | {sum(part.samples for part in manifest.parts)} | {share:.1%} |" in readme
    assert "1.2e-04 nats per row" in readme


def test_names_of_strangers_are_inert(kept_capture: Path) -> None:
    manifest = _manifest(kept_capture)
    changes = {
        "teacher": manifest.teacher.model_copy(update={"model": HOSTILE, "revision": HOSTILE, "quantization": HOSTILE}),
        "tokenizer": manifest.tokenizer.model_copy(update={"name": HOSTILE}),
        "corpus": manifest.corpus.model_copy(update={"source": HOSTILE, "bad": {HOSTILE: 2}}),
        "set_aside": {7: HOSTILE},
    }
    hostile = manifest.model_copy(update=changes)
    licenses = {"corpus": HOSTILE, "outputs": HOSTILE}
    for title in (None, HOSTILE):
        readme = card_files(str(kept_capture), hostile, licenses, title)["README.md"].decode()
        data = DatasetCard(readme).data.to_dict()
        assert data["license"] == "other"
        assert set(data) == {"pretty_name", "license", "license_name", *("task_categories", "size_categories")} | {
            "tags",
            "configs",
        }
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(readme.split("\n---\n", 1)[1])
        flat = [*tokens, *(child for token in tokens for child in token.children or [])]
        assert not [token for token in flat if token.type in ("html_block", "html_inline", "link_open")]
        assert {token.attrGet("src") for token in flat if token.type == "image"} == set(PLOTS)
        plain_card = MarkdownIt("commonmark").enable("table").parse(_readme(kept_capture).split("\n---\n", 1)[1])
        for kind in ("heading_open", "fence", "table_open", "list_item_open"):
            more = 2 if kind == "list_item_open" else 0  # documents skipped, shards missing
            assert sum(t.type == kind for t in tokens) == sum(t.type == kind for t in plain_card) + more, kind
        assert "\u202e" not in readme


def test_markup() -> None:
    assert one_line(" a\r\n\tb\x00\u2028c ") == "a b c"
    assert len(one_line("x" * 999)) == 160
    assert (code("a`b|c"), code("")) == ("`a'b¦c`", "`-`")
    assert plain("a_b <i>") == "a&#95;b &#60;i&#62;"
    assert latex("a\\b{c}_%é") == "a b c é"
    assert public("/home/me/models/gemma/") == "gemma"
    assert public("C:\\data\\c.jsonl") == "c.jsonl"
    assert (public("Qwen/Qwen3-4B"), public("s3://team/c")) == ("Qwen/Qwen3-4B", "s3://team/c")
    assert quantile(np.array([0, 3, 1]), 0.5) == 1


def test_writing_seals_and_repeats_byte_by_byte(capture: Path) -> None:
    before = content_hash(_manifest(capture))
    figures = write_card(CardConfig(capture=str(capture), license=FLAGS), Silent())
    assert figures["plots"] == len(PLOTS)
    assert set(PLOTS) == set(SEALED_PLOTS)
    assert _manifest(capture).licenses == LICENSES
    assert content_hash(_manifest(capture)) == before
    verify(str(capture))
    written = _files(capture)
    assert {"README.md", "SHA256SUMS", *PLOTS} <= set(written)
    for name in PLOTS:
        assert b"matplotlib" not in written[name].lower()
    write_card(CardConfig(capture=str(capture)), Silent())  # licences are those of the manifest
    assert written == _files(capture)


def test_a_version_1_capture_stays_one(tmp_path: Path) -> None:
    root = Path(shutil.copytree(GOLDEN / "v1-topk", tmp_path / "capture"))
    write_card(CardConfig(capture=str(root), license=FLAGS), Silent())
    assert json.loads((root / MANIFEST).read_text())["schema_version"] == 1
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "topk_ids" in readme
    assert "topk_codes" not in readme
    verify(str(root))


def test_without_licences_nothing_is_written(capture: Path) -> None:
    before = sorted(capture.rglob("*"))
    with pytest.raises(XtokenError, match=r"no licence of its corpus and outputs.*--license corpus=cc-by-4.0"):
        write_card(CardConfig(capture=str(capture)), Silent())
    assert sorted(capture.rglob("*")) == before


def test_without_matplotlib_old_plots_go(capture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(CardConfig(capture=str(capture), license=FLAGS), Silent())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures = write_card(CardConfig(capture=str(capture)), Silent())
    assert "pip install 'xtoken[plots]'" in figures["plots"]
    assert not [name for name in PLOTS if (capture / name).exists()]
    assert "plots/" not in (capture / "README.md").read_text(encoding="utf-8")
    verify(str(capture))


def test_students_are_counted(kept_capture: Path, sampled: Path) -> None:
    manifest = _manifest(kept_capture)
    teacher = manifest.teacher.model
    source = next(path for path in (Path(teacher), Path(teacher).parent) if path.exists())
    of_bytes, same = alignments(str(kept_capture), manifest, ["bytes", str(source)])
    tokens = sum(part.tokens for part in manifest.parts)
    assert same.chunks == same.one_to_one == same.student_tokens == tokens
    assert of_bytes.samples == same.samples == sum(part.samples for part in manifest.parts)
    assert of_bytes.text_bytes == sum(part.text_bytes for part in manifest.parts)
    assert 0 < of_bytes.one_to_one < of_bytes.chunks <= tokens
    with pytest.raises(XtokenError, match=r"--students bytes needs the text"):
        alignments(str(sampled), _manifest(sampled), ["bytes"])


def test_columns_left_out(capture: Path) -> None:
    left = ["kept", "topk_codes", "topk_gap", "rest_gap", "text"]
    for path in (capture / "data").iterdir():
        pq.write_table(pq.read_table(path).drop_columns(left), path)
    files = card_files(str(capture), _manifest(capture).model_copy(update={"left_out": left}), LICENSES, None)
    readme = files["README.md"].decode()
    assert set(files) == {"README.md", "plots/bytes-per-token.png"}
    assert "entries were left out" in readme
    assert "teacher's bits per byte" in readme
    assert "topk_gap" not in readme
    assert "--for alm --corpus CORPUS" in readme


def test_a_damaged_part_is_named(capture: Path) -> None:
    path = capture / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    emptied = [[] for _ in range(table.num_rows)]
    at = table.column_names.index("rest_gap")
    pq.write_table(table.set_column(at, table.field(at), pa.array(emptied, table.field(at).type)), path)
    with pytest.raises(VerificationError, match=r"part-00000.*xtoken verify"):
        card_files(str(capture), _manifest(capture), LICENSES, None)


def test_the_template_is_shipped() -> None:
    spec = importlib.util.find_spec("xtoken.pipeline.share.card.card")
    assert spec is not None
    assert spec.origin is not None
    names = {path.name for path in Path(spec.origin).parent.glob("*.md")}
    assert names == {"template.md", "reading_any.md"}
    for info in (CodecInfo(k=1), CodecInfo(name="sampled", draws=1)):
        assert "\n===\n" in open_codec(info).recipe
