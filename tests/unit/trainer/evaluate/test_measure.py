"""Bits per byte, KL, agreement and the teacher's own figure, whole and in parts, against sums made by hand."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from xtoken.schemas.categories import CATEGORIES
from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.samples import read_sample
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.evaluate import EvalSample, evaluate
from xtoken.trainer.evaluate.spelling import token_bytes
from xtoken.trainer.losses import reference
from xtoken.trainer.losses.base import ProjectionArrays
from xtoken.trainer.losses.pkl import PKL, heaviest
from xtoken.trainer.student.model import load_student

SAMPLES = [
    EvalSample(np.array([3, 4, 5, 6, 1], np.int32), 9, 2, "a#0", "web"),
    EvalSample(np.array([7, 8], np.int32), 3, 1, "b#0", "code"),
    EvalSample(np.array([9, 11, 10], np.int32), 5, 2, "c#0", "web"),
]


def eval_config(student_dir: str, **options: Any) -> EvalConfig:
    return EvalConfig(model=student_dir, max_tokens=32, device="cpu", **options)


def log_probabilities(model: Any, sequence: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0, :, :24].double().log_softmax(-1)


@pytest.mark.parametrize("context", [0, 1, None])
def test_bits_per_byte(student_dir: str, student_info: Any, context: int | None, tmp_path: Path) -> None:
    """BOS first; eos first; nothing first, then the first token's bits and bytes do not count."""
    info = student_info.model_copy(update={"adds_bos": context == 0, "eos_id": None if context is None else 1})
    rows: list[dict[str, Any]] = []
    out = str(tmp_path / "documents.jsonl")
    figures = evaluate(eval_config(student_dir, text="given", out=out), info, SAMPLES, Silent(), rows)
    assert figures.pop("out") == out
    assert [json.loads(line) for line in Path(out).read_text().splitlines()] == rows
    model = load_student(student_dir, torch.device("cpu"), False)
    bits, sizes = [], []
    for sample in SAMPLES:
        sequence = ([] if context is None else [context]) + sample.ids.tolist()
        logp = log_probabilities(model, sequence)
        bits.append(-float(sum(logp[i, token] for i, token in enumerate(sequence[1:]))) / math.log(2))
        sizes.append(sample.text_bytes - (sample.first_token_bytes if context is None else 0))
    assert sum(sizes) == (17 if context is not None else 12)
    assert figures["bits_per_byte"] == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    assert figures["bytes"] == sum(sizes)
    web = {"bits_per_byte": pytest.approx((bits[0] + bits[2]) / (sizes[0] + sizes[2]), rel=1e-5)}
    assert figures["by_source"] == {
        "code": {"bits_per_byte": pytest.approx(bits[1] / sizes[1], rel=1e-5), "bytes": sizes[1]},
        "web": {**web, "bytes": sizes[0] + sizes[2]},
    }
    assert rows == [
        {"id": s.id, "source": s.source, "bits": pytest.approx(found, rel=1e-5), "bytes": size}
        for s, found, size in zip(SAMPLES, bits, sizes, strict=True)
    ]


def test_a_sample_without_prediction_has_no_row(student_dir: str, student_info: Any) -> None:
    bare = student_info.model_copy(update={"adds_bos": False, "eos_id": None})
    samples = [EvalSample(np.array([3], np.int32), 2, 2, "one"), EvalSample(np.array([3, 4], np.int32), 3, 2, "two")]
    rows: list[dict[str, Any]] = []
    figures = evaluate(eval_config(student_dir, text="given"), bare, samples, Silent(), rows)
    assert [row["id"] for row in rows] == ["two"]
    assert figures["bytes"] == rows[0]["bytes"] == 1
    assert "by_source" not in figures  # no sample names one


def test_batches_and_blocks_change_nothing(
    student_dir: str, student_info: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    evaluate(eval_config(student_dir, text="given"), student_info, SAMPLES, Silent(), rows)
    monkeypatch.setattr("xtoken.trainer.evaluate.bits_per_byte._MICRO_TOKENS", 1)
    monkeypatch.setattr("xtoken.trainer.blocks.BLOCK_ELEMENTS", 50)  # two positions
    apart: list[dict[str, Any]] = []
    evaluate(eval_config(student_dir, text="given"), student_info, SAMPLES, Silent(), apart)
    assert [row["bits"] for row in apart] == pytest.approx([row["bits"] for row in rows], rel=1e-5)


def spell(root: str, spelling: dict[int, bytes]) -> None:
    """Give tokens other bytes in the vocabulary of a target folder."""
    path, manifest = Path(root) / "student_vocab.parquet", Path(root) / "manifest.json"
    table = pq.read_table(path)
    column = [spelling.get(i, data) for i, data in enumerate(table.column("bytes").to_pylist())]
    at = table.schema.get_field_index("bytes")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(column, pa.binary())), path)
    told = json.loads(manifest.read_text())
    told["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(told))


def test_kl_agreement_and_teacher(
    make_targets: Callable[..., str], student_dir: str, student_info: Any, pair: Any
) -> None:
    root = make_targets([[9, 12, 31], [30, 30, 32], [32, 32]])
    spell(root, {3: b"7", 4: b"19", 5: b" +", 6: b"\xe2\x82", 7: "ж".encode()})
    figures = evaluate(eval_config(student_dir, targets=root), student_info, [], Silent())
    targets, model = Targets(root), load_student(student_dir, torch.device("cpu"), False)
    W = torch.tensor(pair.weight_VU.astype(np.float32)).double()
    kl, agreed, nats, size = defaultdict[str, list[float]](list), defaultdict[str, int](int), 0.0, 0
    category_of = [CATEGORIES[i] for i in token_bytes(targets).categories()]
    layout = Layout(0, 32, 24, (PKL(pair.setup()),))
    for ref in targets.groups:
        group = targets.read(ref, (*layout.columns(0), "teacher_logprob"))
        for row in range(ref.rows):
            sample = read_sample([(group, row)], layout)
            (part,) = sample.targets
            assert part is not None
            logp, entry = log_probabilities(model, sample.sequence.tolist()), 0
            for c, position in enumerate(part.first_C):
                count = int(part.columns["pkl_count"][c])
                ids = part.columns["pkl_ids"][entry : entry + count].tolist()
                p = np.exp(part.columns["pkl_logprob"][entry : entry + count].astype(float)).tolist()
                entry += count
                rest = float(np.exp(part.columns["pkl_rest_logprob"][c]))
                category = category_of[int(sample.sequence[position + 1])]
                kl[category].append(
                    float(reference.p_kl(logp[position].exp(), W, dict(zip(ids, p, strict=True)), rest))
                )
                row_U = W[logp[position].argmax()]
                agreed[category] += bool(row_U.sum() > 0) and int(row_U.argmax()) == ids[0]
            end_C, logprob_C = group.values("chunk_student_end", row), group.values("teacher_logprob", row)
            nats -= float(logprob_C[:-1].sum())
            size += int(end_C[-2])  # one byte per token; the last chunk has no row
    chunks = sum(map(len, kl.values()))
    assert figures["chunks"] == chunks
    assert figures["kl"] == pytest.approx(sum(map(sum, kl.values())) / chunks, rel=1e-5)
    assert figures["top1_agreement"] == sum(agreed.values()) / chunks > 0
    assert set(kl) == {"numerals_1", "numerals_2", "operators", "partial_utf8", "other_scripts", "latin"}
    assert figures["by_category"] == {
        name: {
            "kl": pytest.approx(np.mean(found), rel=1e-5),
            "top1_agreement": agreed[name] / len(found),
            "chunks": len(found),
        }
        for name, found in kl.items()
    }
    assert figures["teacher_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_heaviest_takes_the_larger_weight_then_the_lower_id() -> None:
    w = ProjectionArrays(
        np.array([1, 1, 1, 3, 3], np.int32),
        np.array([9, 2, 4, 8, 5], np.int32),
        np.array([0.1, 0.8, 0.1, 0.5, 0.5], np.float32),
        np.zeros(5, bool),
        np.zeros(5, bool),
    )
    assert heaviest(w, 5).tolist() == [-1, 2, -1, 5, -1]


def test_training_mode_is_given_back(student_dir: str, student_info: Any) -> None:
    from xtoken.trainer.evaluate import measure_student
    from xtoken.trainer.objective import Student

    for mode in (True, False):
        model = load_student(student_dir, torch.device("cpu"), False).train(mode)
        student = Student(model, torch.device("cpu"), None, 24)
        measure_student(student, student_info, SAMPLES, None, 32, Silent())
        assert model.training is mode


def test_nothing_to_measure(make_targets: Callable[..., str], student_dir: str, student_info: Any) -> None:
    with pytest.raises(XtokenError, match="holds no tokens"):
        evaluate(eval_config(student_dir, text="given"), student_info, [], Silent())
    bare = student_info.model_copy(update={"adds_bos": False, "eos_id": None})
    with pytest.raises(XtokenError, match="no token that the model predicts"):
        evaluate(eval_config(student_dir, text="x"), bare, [EvalSample(np.array([3], np.int32), 1, 1)], Silent())
    with pytest.raises(XtokenError, match="no chunk"):
        evaluate(eval_config(student_dir, targets=make_targets([[1, 1]])), student_info, [], Silent())
    only = make_targets([[5, 5]], name="only", losses=("h-kl",))
    with pytest.raises(XtokenError, match="no columns for loss 'p-kl'"):
        evaluate(eval_config(student_dir, targets=only), student_info, [], Silent())


def test_passes_are_larger_on_a_gpu() -> None:
    """A head that is not fused makes all logits of a pass, which bounds it anywhere."""
    from types import SimpleNamespace
    from typing import cast

    from xtoken.trainer.evaluate.bits_per_byte import micro_tokens
    from xtoken.trainer.objective import Student

    def tokens(device: str, fusable: bool, vocabulary: int) -> int:
        head = SimpleNamespace(fusable=fusable)
        found = SimpleNamespace(device=torch.device(device), head=head, vocabulary=vocabulary)
        return micro_tokens(cast(Student, found))

    assert [tokens("cpu", True, 1 << 18), tokens("cuda", True, 1 << 18)] == [2048, 16_384]
    assert [tokens("cpu", False, 1 << 15), tokens("cuda", False, 1 << 15)] == [2048, 8192]
    assert [tokens("cpu", False, 1 << 18), tokens("cuda", False, 1 << 18)] == [1024, 1024]
