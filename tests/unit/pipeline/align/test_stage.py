"""Reading parts and encoding for the student: the awkward tokenizers and the awkward storage."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from in_process import InProcess

from xtoken.pipeline.align.checks import Rules, summary_batch
from xtoken.pipeline.align.chunks import Chunks, Joined, join
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.parts import CaptureParts
from xtoken.pipeline.align.prefix import first_tokens
from xtoken.pipeline.align.rows import Recipe, RowBatch
from xtoken.pipeline.align.stage import AlignJob, encode
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.project import build_w
from xtoken.pipeline.store.reader import load_vocab
from xtoken.pipeline.tokens import Encoded, TokenTable, load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CodecInfo
from xtoken.schemas.ui.progress import Silent

TEXT = "The ﬁrst ofﬁce, ２０２６: x² and ①, then plain words again.\n"
CODEC = CodecInfo(k=16, min_p=0.003, step=1 / 32)
LOSSES = ("p-kl", "h-kl", "gold", "uld", "alm", "strict", "mined", "byte-prefix")


@pytest.fixture(scope="module")
def capture(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stage")
    (root / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    teacher = str(tokenizer_file("smollm2"))
    config = PrecomputeConfig.from_flat(
        corpus=str(root / "a.txt"), teacher=teacher, out=str(root / "c"), backend="fake", k=16
    )
    precompute(config, Silent(), executor=InProcess())
    return root / "c"


@pytest.fixture(scope="module")
def nfkc(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's tokenizer behind an NFKC normaliser: its tokens are not the stored text's."""
    data = json.loads(tokenizer_file("smollm2").read_text(encoding="utf-8"))
    data["normalizer"] = {"type": "NFKC"}
    path = tmp_path_factory.mktemp("nfkc") / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


@pytest.mark.thorough
def test_a_normalising_student_gets_coarser_chunks_never_wrong_ones(capture: Path, nfkc: str) -> None:
    student, teacher = load_tokenizer(nfkc), load_vocab(str(capture))
    phi_B = first_tokens(teacher, student)
    maps = Maps.of(build_w(student.table, teacher), "prefix", student.table, teacher, phi_B=phi_B)
    (batch,) = CaptureParts(str(capture), "1GB").read(0)
    samples = join(batch, encode(student, batch), student.table.info.eos_id)
    assert len(samples) == batch.num_rows
    assert all(sample.encoded.snapped for sample in samples)
    recipe = Recipe(LOSSES, "first", 1.0, CODEC)
    targets, counts = target_batch(batch, samples, maps, recipe)
    Rules(maps, recipe).check(summary_batch(batch, samples, targets, LOSSES))
    assert counts["snapped"] == len(samples)
    text = batch["text"][0].as_py().encode()
    ends = np.concatenate([[0], samples[0].encoded.ends])[samples[0].chunks.student_end]
    pieces = [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert b"".join(pieces) == text
    assert all(piece.decode() for piece in pieces[:-1]), "a chunk's border lies inside a changed character"


class _Picky:
    """A tokenizer that refuses texts with a marker, alone or in a batch."""

    def __init__(self, marker: str) -> None:
        self._inner = load_tokenizer("bytes")
        self._marker = marker
        self.table: TokenTable = self._inner.table

    def normalise(self, text: str) -> str:
        return text

    def encode(self, text: str, *, complete: bool, keep_text: bool = False) -> Encoded:
        if self._marker in text:
            raise XtokenError("nothing in common")
        return self._inner.encode(text, complete=complete, keep_text=keep_text)

    def encode_batch(
        self, texts: Sequence[str], completes: Sequence[bool], *, keep_text: bool = False
    ) -> list[Encoded]:
        return [self.encode(text, complete=c, keep_text=keep_text) for text, c in zip(texts, completes, strict=True)]


def test_a_sample_the_student_cannot_encode_is_left_out_alone() -> None:
    columns: dict[str, Any] = {
        "text": ["ab", "bad", "c"],
        "complete": [True, True, False],
        "teacher_end": [[1, 2], [3], [1]],
        "teacher_eos": [False] * 3,
    }
    batch = pa.RecordBatch.from_pydict(columns)
    found = encode(_Picky("bad"), batch)
    assert [one is not None for one in found] == [True, False, True]
    samples = join(batch, found, None)
    assert [sample.at for sample in samples] == [0, 2]
    assert samples[0].chunks.teacher_end.tolist() == [1, 2]


def test_a_part_is_read_from_any_filesystem(capture: Path) -> None:
    fsspec.filesystem("memory").put(str(capture), "memory://elsewhere", recursive=True)
    assert list(CaptureParts("memory://elsewhere", "1GB").read(0)) == list(CaptureParts(str(capture), "1GB").read(0))


def test_a_missing_part_is_named(capture: Path) -> None:
    with pytest.raises(XtokenError, match=r"part-00007.parquet cannot be read|part 7 of .* cannot be read"):
        list(CaptureParts(str(capture), "1GB").read(7))


def test_kept_ids_outside_the_vocabulary_are_refused(capture: Path, tmp_path: Path) -> None:
    projection = build_w(load_tokenizer("bytes").table, load_vocab(str(capture)))
    job = AlignJob(
        AlignConfig(captures=[str(capture)], student="bytes", out=str(tmp_path)),
        str(capture),
        str(tmp_path),
        projection,
        CODEC,
    )
    worker = job.open()
    worker = replace(worker, maps=replace(worker.maps, teacher_size=10))
    with pytest.raises(XtokenError, match="has an id outside 0 to 9 in topk_ids"):
        worker.run(0, 1)
    assert not list(tmp_path.rglob("part-*"))


@pytest.mark.parametrize("name", ["teacher_end", "rest_gap", "realised_logprob", "space_logprob", "teacher_ids"])
def test_lists_that_do_not_fit_are_refused(capture: Path, name: str) -> None:
    (batch,) = CaptureParts(str(capture), "1GB").read(0)
    at = batch.schema.get_field_index(name)
    shorter = pa.array([values[:-1] for values in batch[name].to_pylist()], batch.schema.field(at).type)
    with pytest.raises(VerificationError, match=f"{name} has another length than its rows"):
        RowBatch.of(batch.set_column(at, batch.schema.field(at), shorter), Recipe(LOSSES, "first", 1.0, CODEC))


OUTSIDE = "has an id outside the student's vocabulary"
# What is put in the place of a sample's first value of a column, or done to its list, and the rule that this breaks.
BREACHES: dict[tuple[str, int], tuple[Any, str]] = {
    ("student_ids", 0): (10**6, f"student_ids {OUTSIDE}"),
    ("student_ids", 1): (-1, f"student_ids {OUTSIDE}"),
    ("student_ids", 2): (lambda ids: ids[:-1], "student_end has another length than its tokens"),
    ("student_end", 0): (lambda ends: [0, *ends[1:]], "two sides of a chunk cover different bytes"),
    ("chunk_student_end", 0): (lambda ends: [ends[0] + 1, *ends[1:]], "two sides of a chunk cover different bytes"),
    ("chunk_teacher_end", 0): (lambda ends: [ends[0] + 1, *ends[1:]], "two sides of a chunk cover different bytes"),
    ("teacher_logprob", 0): (0.5, "teacher_logprob is not a log-probability"),
    ("pkl_ids", 0): (10**6, "pkl_ids has an id outside the teacher's vocabulary"),
    ("gold_ids", 0): (-1, f"gold_ids {OUTSIDE}"),
    ("hkl_common_ids", 0): (10**6, f"hkl_common_ids {OUTSIDE}"),
    ("prefix_ids", 0): (10**6, f"prefix_ids {OUTSIDE}"),
    ("prefix_logprob", 0): (0.5, "prefix_logprob and the tail mass do not sum to 1"),
    ("pkl_logprob", 0): (-30.0, "pkl_logprob and the tail mass do not sum to 1"),
    ("pkl_rest_logprob", 0): (0.0, "pkl_logprob and the tail mass do not sum to 1"),
    ("pkl_rest_logprob", 1): (0.5, "pkl_rest_logprob is not a log-probability"),
    ("pkl_rest_logprob", 2): (math.nan, "pkl_rest_logprob is NaN where the tail mass is known"),
    ("strict_ids", 0): (10**6, f"strict_ids {OUTSIDE}"),
    ("strict_count", 0): (-1, "strict_count is negative"),
    ("strict_logprob", 0): (0.5, "strict_logprob sums to more than 1"),
    ("mined_ids", 0): (-1, "mined_ids has an id outside the teacher's vocabulary"),
    ("mined_count", 0): (-1, "mined_count is negative"),
    ("mined_logprob", 0): (0.5, "mined_logprob and the tail mass do not sum to 1"),
    ("mined_rest_logprob", 0): (0.5, "mined_rest_logprob is not a log-probability"),
    ("mined_rest_logprob", 1): (math.nan, "mined_rest_logprob is NaN where the tail mass is known"),
    ("hkl_other_logprob", 0): (0.5, "hkl_common_logprob and hkl_other_logprob sum to more than 1"),
    ("gold_other_logprob", 0): (0.5, "gold_logprob and gold_other_logprob sum to more than 1"),
    ("uld_logprob", 0): (0.5, "uld_logprob sums to more than 1"),
    ("factor_logprob", 0): (0.5, "factor_logprob is not a log-probability"),
    ("alm_space_logprob", 0): (0.5, "alm_space_logprob is not a log-probability"),
    ("child_high", 0): (10**6, "a child range is empty or outside the student's tokens"),
    ("child_low", 0): (10**6, "a child range is empty or outside the student's tokens"),
    ("child_logprob", 0): (0.5, "child_logprob sums to more than 1"),
    ("teacher_entropy", 0): (-0.5, "teacher_entropy is negative"),
    ("teacher_top1", 0): (1.5, "teacher_top1 is not a probability"),
}
Checked = tuple[pa.RecordBatch, list[Joined], pa.RecordBatch, Rules]


@pytest.fixture(scope="module")
def checked(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """Targets of llama2's rows for SmolLM2's tokens: some of everything, children included."""
    root = tmp_path_factory.mktemp("checked")
    (root / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    teacher_file = str(tokenizer_file("llama2"))
    config = PrecomputeConfig.from_flat(
        corpus=str(root / "a.txt"), teacher=teacher_file, out=str(root / "c"), backend="fake", max_tokens=64
    )
    precompute(config, Silent(), executor=InProcess())
    student, teacher = load_tokenizer(str(tokenizer_file("smollm2"))), load_vocab(str(root / "c"))
    phi_B = first_tokens(teacher, student)
    maps = Maps.of(build_w(student.table, teacher), "prefix", student.table, teacher, phi_B=phi_B)
    (batch,) = CaptureParts(str(root / "c"), "1GB").read(0)
    samples = join(batch, encode(student, batch), student.table.info.eos_id)
    recipe = Recipe(LOSSES, "first", 1.0, CodecInfo(k=64, min_p=0.003, step=1 / 32))
    return batch, samples, target_batch(batch, samples, maps, recipe)[0], Rules(maps, recipe)


def test_good_targets_break_no_rule(checked: Checked) -> None:
    batch, samples, targets, rules = checked
    assert list(rules.broken(summary_batch(batch, samples, targets, LOSSES))) == []


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: f"{breach[0]}-{breach[1]}")
def test_every_rule_of_a_target_is_checked(checked: Checked, breach: tuple[str, int]) -> None:
    batch, samples, targets, rules = checked
    name, (change, rule) = breach[0], BREACHES[breach]
    values = targets[name].to_pylist()
    row = next(at for at, held in enumerate(values) if isinstance(held, float) or held)
    if callable(change):
        values[row] = change(values[row])
    else:
        values[row] = change if isinstance(values[row], float) else [change, *values[row][1:]]
    at = targets.schema.get_field_index(name)
    field = targets.schema.field(at)
    broken = summary_batch(batch, samples, targets.set_column(at, field, pa.array(values, field.type)), LOSSES)
    named = targets["sample_id"][row].as_py()
    assert any(rule in found for sample_id, found in rules.broken(broken) if sample_id == named)
    with pytest.raises(VerificationError, match=re.escape(f"sample {named!r}: ")):
        rules.check(broken)


def test_a_boundary_that_was_missed_is_found(checked: Checked) -> None:
    batch, samples, _, rules = checked
    fewer = [replace(one, chunks=replace(one.chunks, **_all_but_last(one.chunks))) for one in samples]
    found, _ = target_batch(batch, fewer, rules.maps, rules.recipe)
    rule = "chunks stop before the last common boundary"
    broken = list(rules.broken(summary_batch(batch, fewer, found, LOSSES)))
    # an eos that closes both sides has no bytes: without it no boundary is missing
    closed = {one.at for one in samples if batch["teacher_eos"][one.at].as_py()}
    assert {name for name, said in broken if said == rule} == {
        batch["sample_id"][one.at].as_py() for one in samples if one.at not in closed
    }
    assert len(closed) < len(samples)


def _all_but_last(chunks: Chunks) -> dict[str, Any]:
    return {"student_end": chunks.student_end[:-1], "teacher_end": chunks.teacher_end[:-1], "gap": chunks.gap[:-1]}
