"""A capture with --codec sampled: its rows are the teacher's draws, whatever the batches, workers and shards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.run_identity import codec_info
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CodecInfo
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.usefixtures("one_worker_is_here")

TEXTS = ["Alpha beta, 42 gammas. " * 12, "x", "naïve café\n" * 10, "tail 👩‍👩‍👧 tail", "x"]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "corpus.jsonl"),
        teacher="bytes",
        out=str(tmp_path / "out"),
        backend="fake",
        codec="sampled",
        draws=30,
        seed=5,
        max_tokens=64,
        shard_bytes=300,
    )


def files(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(out) / "data").iterdir())}


def samples(out: str) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for batch in iter_capture(out) for row in batch.to_pylist()}


def test_rows_are_the_teachers_draws(config):
    manifest = precompute(config, Silent())
    assert manifest.codec == CodecInfo(name="sampled", draws=30, seed=5) == codec_info(config.codec)
    teacher = open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)
    seen = 0
    for row in samples(config.out).values():
        if len(row["teacher_ids"]) < 2:
            assert row["drawn"] == row["draw_ids"] == row["draw_count"] == row["entropy"] == []
            continue
        (full,) = teacher.rows([np.array(row["teacher_ids"], np.int32)])
        assert row["drawn"] == full.draws.drawn.tolist()
        assert row["draw_ids"] == full.draws.ids.tolist()
        assert row["draw_count"] == full.draws.count.tolist()
        np.testing.assert_allclose(row["entropy"], full.draws.entropy, rtol=2e-5)
        np.testing.assert_allclose(row["realised_logprob"], full.target_logprob, rtol=2e-5)
        np.testing.assert_allclose(row["space_logprob"], full.space_logprob, rtol=2e-5)
        seen += len(row["drawn"])
    assert seen > 300
    report = verify(config.out)
    assert report["rows"] == seen
    assert report["entries"] == sum(sum(row["drawn"]) for row in samples(config.out).values())
    found = pq.read_schema(Path(config.out) / data_name(0))
    assert found.equals(open_codec(manifest.codec).schema(), check_metadata=True)


def test_batches_workers_and_shards_change_no_draw(config, tmp_path):
    precompute(config, Silent())
    whole = files(config.out)
    again = config.changed(out=str(tmp_path / "again"), batch_tokens=65, workers=2)
    precompute(again, Silent())
    assert files(again.out) == whole
    cut = config.changed(out=str(tmp_path / "cut"), shard_bytes=1, batch_tokens=10**6)
    precompute(cut, Silent())
    assert samples(cut.out) == samples(config.out)
    assert len(files(cut.out)) > len(whole)
    other = config.changed(out=str(tmp_path / "other"), seed=6)
    precompute(other, Silent())
    pairs = list(zip(samples(config.out).values(), samples(other.out).values(), strict=True))
    assert all(a["entropy"] == b["entropy"] for a, b in pairs)
    assert any(a["draw_ids"] != b["draw_ids"] for a, b in pairs)


def test_equal_samples_have_equal_draws(config):
    precompute(config, Silent())
    first, last = (row for row in samples(config.out).values() if row["text"] == "x")
    assert first["draw_ids"] == last["draw_ids"]


def with_codec(config, **values):
    """With other settings, of other codecs too, which no command line may give."""
    return config.model_copy(update={"codec": config.codec.model_copy(update=values)})


def test_draws_and_seed_are_the_runs_identity(config):
    manifest = precompute(config, Silent())
    (Path(config.out) / "manifest.json").unlink()
    (Path(config.out) / "commits" / "part-00001.json").unlink()
    whole = files(config.out)
    (Path(config.out) / data_name(1)).unlink()
    for change, message in (
        ({"seed": 4}, "seed: 5 there, 4 now"),
        ({"draws": 31}, "draws: 30 there, 31 now"),
        ({"codec": "topk"}, "codec: 'sampled' there, None now.*draws: 30 there, None now.*k: None there, 64 now"),
    ):
        with pytest.raises(XtokenError, match=message):
            precompute(with_codec(config, **change), Silent())
    # options of the other codec change nothing
    again = precompute(with_codec(config, k=3, min_p=0.5), Silent())
    assert (again.run_hash, again.parts) == (manifest.run_hash, manifest.parts)
    assert files(config.out) == whole


def test_a_topk_run_begun_before_there_were_draws_resumes_and_refuses_draws(config):
    plain = with_codec(config, codec="topk")
    precompute(plain, Silent())
    run = Path(config.out) / "run.json"
    settings = json.loads(run.read_text())
    for name in ("codec", "draws", "seed"):
        assert settings.pop(name) is None
    run.write_text(json.dumps(settings))
    precompute(with_codec(plain, draws=7, seed=8), Silent())
    with pytest.raises(XtokenError, match="codec: None there, 'sampled' now"):
        precompute(config, Silent())


def test_more_entries_than_the_vocabulary_are_nobodys_concern(config):
    precompute(with_codec(config, k=255), Silent())


@pytest.mark.usefixtures("vllm_gives_the_top_k")
def test_an_engine_of_top_k_is_refused_before_anything_is_read_or_written(config):
    asked = config.changed(backend="vllm", corpus="absent", teacher="absent/model")
    with pytest.raises(XtokenError, match=r"--codec sampled.*'vllm'.*--backend hf or vllm, or --codec topk"):
        precompute(asked, Silent())
    assert not Path(config.out).exists()
