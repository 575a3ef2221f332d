"""Several teachers in one command: a folder each, one plan, and a failure that costs the others nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.capture.multi_teacher import each_below, teacher_name
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest

pytestmark = pytest.mark.usefixtures("one_worker_is_here")


@pytest.fixture
def words(tmp_path):
    lines = [json.dumps({"text": f"document {number}: " + "some words, and more. " * 20}) for number in range(9)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    flags = ["--backend", "fake", "--k", "4", "--shard-bytes", "1500", "--out", str(tmp_path / "out"), "--json"]
    return ["precompute", str(tmp_path / "corpus.jsonl"), *flags]


def call(*words):
    result = CliRunner().invoke(cli.app, [*words])
    assert result.stdout, (result.exception, result.stderr)
    return result.exit_code, json.loads(result.stdout)


def manifests(out: Path) -> list[CaptureManifest]:
    return [read_manifest(str(path), CaptureManifest) for path in sorted(out.iterdir()) if path.is_dir()]


def test_one_plan_a_folder_each_and_a_row_each(words, tmp_path, tokenizer_file):
    smol = tokenizer_file("smollm2").parent
    code, figures = call(*words, "--teacher", "bytes", "--teacher", str(smol))
    assert code == 0
    assert [row["teacher"] for row in figures["teachers"]] == ["bytes", str(smol)]
    assert {row["outcome"] for row in figures["teachers"]} == {"done"}
    assert all(row["tokens"] > 0 for row in figures["teachers"])
    first, second = manifests(tmp_path / "out")
    assert first.plan_hash == second.plan_hash
    assert first.tokenizer.hash != second.tokenizer.hash
    plans = [(tmp_path / "out" / name / "plan.json").read_bytes() for name in ("bytes", smol.name)]
    assert plans[0] == plans[1]
    for row in figures["teachers"]:
        verify(row["out"])


def test_one_teacher_goes_to_out_itself(words, tmp_path):
    code, figures = call(*words, "--teacher", "bytes")
    assert code == 0
    assert figures["out"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("order", [("nobody", "bytes"), ("bytes", "nobody")])
def test_a_teacher_that_fails_costs_the_others_nothing(words, tmp_path, order):
    names = {"bytes": "bytes", "nobody": str(tmp_path / "nobody")}
    teachers = [word for name in order for word in ("--teacher", names[name])]
    code, said = call(*words, *teachers)
    assert code == 2
    assert "1 of 2 teachers failed, the others' captures stand" in said["error"]
    assert f"{tmp_path / 'nobody'}: " in said["error"]
    assert {row["outcome"] for row in said["teachers"]} == {"done", "failed"}
    verify(str(tmp_path / "out" / "bytes"))


def test_the_plan_is_taken_from_whoever_has_one(words, tmp_path, tokenizer_file):
    smol = tokenizer_file("smollm2").parent
    out = str(tmp_path / "out" / smol.name)
    assert call(*words, "--teacher", str(smol), "--out", out)[0] == 0
    code, _ = call(*words, "--teacher", "bytes", "--teacher", str(smol))
    assert code == 0
    assert len({manifest.plan_hash for manifest in manifests(tmp_path / "out")}) == 1


def test_folders_of_different_documents_are_refused(words, tmp_path, tokenizer_file):
    smol = tokenizer_file("smollm2").parent
    assert call(*words, "--teacher", str(smol), "--out", str(tmp_path / "out" / smol.name))[0] == 0
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    assert call(*words, "--teacher", "bytes", "--out", str(tmp_path / "out" / "bytes"))[0] == 0
    code, said = call(*words, "--teacher", "bytes", "--teacher", str(smol))
    assert code == 2
    assert "planned from different documents" in said["error"]


def test_a_dry_run_of_several_makes_nothing(words, tmp_path, tokenizer_file):
    code, figures = call(*words, "--dry-run", "--teacher", "bytes", "--teacher", str(tokenizer_file("smollm2").parent))
    assert code == 0
    assert [row["outcome"] for row in figures["teachers"]] == ["planned", "planned"]
    assert not (tmp_path / "out").exists()


def test_names_of_folders():
    assert teacher_name("Qwen/Qwen3-4B") == "Qwen3-4B"
    assert teacher_name("/models/My model (2)/") == "My-model-2"
    assert teacher_name("..") == "teacher"
    flags = {"corpus": "c", "out": "s3://bucket/out/"}
    found = each_below([PrecomputeConfig.from_flat(**flags, teacher=name) for name in ("a/one", "b/two")])
    assert [config.out for config in found] == ["s3://bucket/out/one", "s3://bucket/out/two"]
    with pytest.raises(XtokenError, match="--teacher a/one and --teacher b/One would both go"):
        each_below([PrecomputeConfig.from_flat(**flags, teacher=name) for name in ("a/one", "b/One")])
