"""``--audit hf`` by several worker processes: one of them loads the teacher again, whichever commits first."""

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from audit_jobs import TogetherJob

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.audit import read_audits
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import AUDITS
from xtoken.pipeline.teachers.weights import content_hash, weight_files
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.engine


@pytest.fixture
def config(tmp_path: Path, smollm2_dir: Path) -> PrecomputeConfig:
    """A capture in many shards by a small teacher of transformers'."""
    teacher = tmp_path / "teacher"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=49152, initializer_range=0.5, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, teacher / name)
    texts = [f"Chapter {number}: the quick brown fox jumps. " * 8 for number in range(16)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "corpus.jsonl"),
        teacher=str(teacher),
        out=str(tmp_path / "out"),
        backend="hf", device="cpu", k=8, max_tokens=64, shard_bytes=400, workers=2, audit="hf", audit_rows=40,
    )  # fmt: skip


def test_one_worker_audits_and_another_takes_its_turn_where_it_dies(config: PrecomputeConfig, tmp_path: Path) -> None:
    manifest = precompute(config, Silent(), make_job=partial(TogetherJob, folder=str(tmp_path)))
    assert manifest is not None
    assert manifest.teacher.weights_hash == content_hash(weight_files(config.teacher.teacher))
    loads = sorted(tmp_path.glob("loaded-*"))
    assert len(loads) == 2, "the one that was killed over it, and the one after it; not the other worker"
    assert [record.method for record in read_audits(Folder(config.out))] == ["hf"]
    assert len(list((Path(config.out) / AUDITS).iterdir())) == 1, "whose turn it was is forgotten"
    events = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    parts = Counter(one["worker"] for one in events if one["event"] == "part")
    assert len(parts) == 2, f"both workers committed: {parts}"
    assert sum(one["event"] == "died" for one in events) == 1
