"""A capture with --temperatures: another column and another identity; without, nothing of it is there."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.topk import decode, decode_tau_tail
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.store.writer import write_parquet
from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, CodecInfo, read_manifest
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.usefixtures("one_worker_is_here")

CAPTURE = open_codec(CodecInfo(k=64)).schema()
TAU_CODEC = open_codec(CodecInfo(k=64, temperatures=[1.0, 2.0, 4.0]))

TEXTS = ["Alpha beta, 42 gammas. " * 20, "x", "naïve café\n" * 15]
TEMPERATURES = [2.0, 4.0]


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
        shard_bytes=300,
        temperatures=[4, 1, 2, 4],
    )


def files(out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(out) / "data").iterdir())}


def test_every_row_holds_its_rest_at_each_temperature(config):
    manifest = precompute(config, Silent())
    assert manifest.codec.temperatures == [1.0, *TEMPERATURES]
    tokenizer = load_tokenizer("bytes")
    size = tokenizer.table.size
    teacher = open_teacher(config.teacher, config.codec.model_copy(update={"k": size}), tokenizer.table)
    rows_seen = 0
    for sample in (row for batch in iter_capture(config.out) for row in batch.to_pylist()):
        if not sample["kept"]:
            assert sample["tau_rest_odds"] == []
            continue
        (full,) = teacher.rows([np.array(sample["teacher_ids"], np.int32)])
        found = decode(*(np.array(sample[name]) for name in ("kept", "topk_ids", "topk_gap", "rest_gap")))
        gaps = np.array(sample["tau_rest_odds"], np.int16)
        for tau in TEMPERATURES:
            rest_R = decode_tau_tail(gaps, manifest.codec.temperatures, tau, manifest.codec.step)
            for r in range(len(sample["kept"])):
                p_U = np.exp(full.logprob[r].astype(np.float64) / tau)
                kept = np.isin(full.ids[r], found.ids[found.offsets[r] : found.offsets[r + 1]])
                assert rest_R[r] == pytest.approx(np.log(p_U[~kept].sum() / p_U.sum()), abs=1 / 64 + 1e-5)
                rows_seen += 1
    assert rows_seen > 1000
    assert verify(config.out)["kind"] == "capture"
    shown = inspect(config.out)
    assert shown["provenance"]["codec"]["temperatures"] == [1.0, 2.0, 4.0]
    assert set(shown["samples_shown"][0]["row"]["tau_rest_logprob"]) == {"2", "4"}
    assert shown["bytes_per_token"]["tau_rest_odds"] > 0


def test_without_temperatures_nothing_changes(config, tmp_path):
    plain = config.changed(temperatures=[], out=str(tmp_path / "plain"))
    with_, without = precompute(config, Silent()), precompute(plain, Silent())
    for part in without.parts:
        assert pq.read_schema(Path(plain.out) / data_name(part.index)).equals(CAPTURE, check_metadata=True)
    assert without.codec.temperatures == [1.0]
    assert "tau_rest_logprob" not in inspect(plain.out)["samples_shown"][0]["row"]
    assert with_.run_hash != without.run_hash
    assert with_.plan_hash == without.plan_hash
    ours, theirs = (pa.Table.from_batches(iter_capture(where)) for where in (config.out, plain.out))
    assert ours.drop_columns(["tau_rest_odds"]).equals(theirs)
    assert ours.schema.names == TAU_CODEC.schema(version=1).names


@pytest.mark.thorough
def test_a_killed_run_resumes_to_the_same_bytes_and_other_temperatures_are_refused(config):
    manifest = precompute(config, Silent())
    whole = files(config.out)
    (Path(config.out) / "manifest.json").unlink()
    (Path(config.out) / "commits" / "part-00001.json").unlink()
    (Path(config.out) / data_name(1)).unlink()
    for other, message in (([2.0], r"temperatures: \[2\.0, 4\.0\] there, \[2\.0\] now"), ([], "there, None now")):
        with pytest.raises(XtokenError, match=message):
            precompute(config.changed(temperatures=other), Silent())
    again = precompute(config, Silent())
    assert (again.run_hash, again.parts) == (manifest.run_hash, manifest.parts)
    assert files(config.out) == whole


def test_a_run_begun_before_there_were_temperatures_resumes_without_and_refuses_with(config):
    plain = config.changed(temperatures=[])
    precompute(plain, Silent())
    run = Path(config.out) / "run.json"
    settings = json.loads(run.read_text())
    del settings["temperatures"]
    run.write_text(json.dumps(settings))
    precompute(plain, Silent())
    with pytest.raises(XtokenError, match=r"temperatures: None there, \[2\.0, 4\.0\] now"):
        precompute(config, Silent())


def test_a_column_of_another_length_is_damage(config, tmp_path):
    manifest = precompute(config, Silent())
    check = CaptureCheck(manifest.tokenizer.size, manifest.codec)
    schema = TAU_CODEC.schema()
    rows = pq.read_table(Path(config.out) / data_name(0)).to_pylist()
    copy = str(tmp_path / "part.parquet")
    write_parquet(copy, schema, [pa.RecordBatch.from_pylist(rows, schema)])
    assert check(copy).samples == len(rows)
    rows[-1]["tau_rest_odds"] = rows[-1]["tau_rest_odds"][:-1]
    write_parquet(copy, schema, [pa.RecordBatch.from_pylist(rows, schema)])
    with pytest.raises(VerificationError, match="tau_rest_odds has not 2 values for each row") as caught:
        check(copy)
    assert repr(rows[-1]["sample_id"]) in str(caught.value)


def test_a_part_without_the_column_is_no_part_of_the_capture(config, tmp_path):
    precompute(config, Silent())
    plain = config.changed(temperatures=[], out=str(tmp_path / "plain"))
    precompute(plain, Silent())
    codec = read_manifest(config.out, CaptureManifest).codec
    with pytest.raises(VerificationError, match="not those of the format"):
        CaptureCheck(256, codec)(str(Path(plain.out) / data_name(0)))


@pytest.mark.usefixtures("vllm_gives_the_top_k")
def test_an_engine_of_top_k_is_refused_before_anything_is_read_or_written(config):
    asked = config.changed(backend="vllm", corpus="absent", teacher="absent/model")
    with pytest.raises(XtokenError, match=r"--temperatures 2,4 needs whole.*'vllm'.*--backend hf.*--rest drop"):
        precompute(asked, Silent())
    assert not Path(config.out).exists()
    with pytest.raises(XtokenError, match="--temperatures 2,4"):
        open_teacher(asked.teacher, asked.codec, load_tokenizer("bytes").table)
