"""Reading parts and encoding for the student: the awkward tokenizers and the awkward storage."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from pipeline.align.checks import check_samples, check_targets
from pipeline.align.chunks import join
from pipeline.align.rows import Recipe, RowBatch
from pipeline.align.stage import AlignJob, encode, read_part
from pipeline.align.targets import Maps, target_batch
from pipeline.capture import precompute
from pipeline.project import build_w
from pipeline.store import load_vocab
from pipeline.tokens import Encoded, TokenTable, load_tokenizer
from schemas.capture_config import PrecomputeConfig
from schemas.config import AlignConfig
from schemas.errors import VerificationError, XtokenError
from schemas.manifest import CodecInfo
from schemas.progress import Silent

TEXT = "The ﬁrst ofﬁce, ２０２６: x² and ①, then plain words again.\n"
CODEC = CodecInfo(k=16, min_p=0.003, step=1 / 32)
LOSSES = ("p-kl", "h-kl", "gold", "uld", "alm", "byte-prefix")


@pytest.fixture(scope="module")
def capture(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stage")
    (root / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    teacher = str(tokenizer_file("smollm2"))
    config = PrecomputeConfig(corpus=str(root / "a.txt"), teacher=teacher, out=str(root / "c"), backend="fake", k=16)
    precompute(config, Silent())
    return root / "c"


@pytest.fixture(scope="module")
def nfkc(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's tokenizer behind an NFKC normaliser: its tokens are not the stored text's."""
    data = json.loads(tokenizer_file("smollm2").read_text(encoding="utf-8"))
    data["normalizer"] = {"type": "NFKC"}
    path = tmp_path_factory.mktemp("nfkc") / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def test_a_normalising_student_gets_coarser_chunks_never_wrong_ones(capture: Path, nfkc: str) -> None:
    student, teacher = load_tokenizer(nfkc), load_vocab(str(capture))
    maps = Maps.of(build_w(student.table, teacher), "prefix", student.table, teacher)
    (batch,) = read_part(str(capture), 0, "1GB", teacher.info.eos_id)
    samples = join(batch, encode(student, batch), student.table.info.eos_id)
    assert len(samples) == batch.num_rows
    assert all(sample.encoded.snapped for sample in samples)
    check_samples(batch, samples)
    targets, counts = target_batch(batch, samples, maps, Recipe(LOSSES, "first", 1.0, CODEC))
    check_targets(targets, maps, 1.0)
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
    assert list(read_part("memory://elsewhere", 0, "1GB", 2)) == list(read_part(str(capture), 0, "1GB", 2))


def test_a_missing_part_is_named(capture: Path) -> None:
    with pytest.raises(XtokenError, match=r"part-00007.parquet cannot be read|part 7 of .* cannot be read"):
        list(read_part(str(capture), 7, "1GB", 2))


def test_kept_ids_outside_the_vocabulary_are_refused(capture: Path, tmp_path: Path) -> None:
    projection = build_w(load_tokenizer("bytes").table, load_vocab(str(capture)))
    job = AlignJob(
        AlignConfig(captures=[str(capture)], student="bytes", out=str(tmp_path)),
        str(capture),
        str(tmp_path),
        projection,
        CODEC,
        None,
    )
    worker = job.open()
    worker = replace(worker, maps=replace(worker.maps, teacher_size=10))
    with pytest.raises(XtokenError, match="has an id outside 0 to 9 in topk_ids"):
        worker.run(0, 1)
    assert not list(tmp_path.rglob("part-*"))


@pytest.mark.parametrize("name", ["teacher_end", "rest_gap", "realised_logprob", "space_logprob", "teacher_ids"])
def test_lists_that_do_not_fit_are_refused(capture: Path, name: str) -> None:
    (batch,) = read_part(str(capture), 0, "1GB", 2)
    at = batch.schema.get_field_index(name)
    shorter = pa.array([values[:-1] for values in batch[name].to_pylist()], batch.schema.field(at).type)
    with pytest.raises(VerificationError, match=f"{name} has another length than its rows"):
        RowBatch.of(batch.set_column(at, batch.schema.field(at), shorter), Recipe(LOSSES, "first", 1.0, CODEC))


BREACHES = {
    "pkl_ids": (10**6, "pkl_ids outside"),
    "gold_ids": (-1, "gold_ids outside"),
    "prefix_logprob": (0.5, "prefix_logprob and REST do not sum to 1"),
    "pkl_rest_logprob": (0.0, "pkl_logprob and REST do not sum to 1"),
    "uld_logprob": (0.5, "uld_logprob sums to more than 1"),
    "factor_logprob": (0.5, "factor_logprob is no log-probability"),
    "alm_space_logprob": (0.5, "alm_space_logprob is no log-probability"),
    "child_high": (10**6, "child range is empty or outside"),
    "child_low": (10**6, "child range is empty or outside"),
    "teacher_entropy": (-0.5, "negative entropy"),
    "teacher_top1": (1.5, "top1 is no probability"),
}


@pytest.fixture(scope="module")
def checked(
    tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pa.RecordBatch, Maps]:
    """Targets of llama2's rows for a byte student: some of everything, children included."""
    root = tmp_path_factory.mktemp("checked")
    (root / "a.txt").write_text(TEXT * 3, encoding="utf-8")
    teacher_file = str(tokenizer_file("llama2"))
    config = PrecomputeConfig(corpus=str(root / "a.txt"), teacher=teacher_file, out=str(root / "c"), backend="fake")
    precompute(config, Silent())
    student, teacher = load_tokenizer(str(tokenizer_file("smollm2"))), load_vocab(str(root / "c"))
    maps = Maps.of(build_w(student.table, teacher), "prefix", student.table, teacher)
    (batch,) = read_part(str(root / "c"), 0, "1GB", teacher.info.eos_id)
    samples = join(batch, encode(student, batch), student.table.info.eos_id)
    targets, _ = target_batch(
        batch, samples, maps, Recipe(LOSSES, "first", 1.0, CodecInfo(k=64, min_p=0.003, step=1 / 32))
    )
    check_targets(targets, maps, 1.0)
    return targets, maps


@pytest.mark.parametrize("name", BREACHES)
def test_every_rule_of_a_target_is_checked(checked: tuple[pa.RecordBatch, Maps], name: str) -> None:
    targets, maps = checked
    value, rule = BREACHES[name]
    values = targets[name].to_pylist()
    row = next(at for at, held in enumerate(values) if isinstance(held, float) or held)
    values[row] = value if isinstance(values[row], float) else [value, *values[row][1:]]
    at = targets.schema.get_field_index(name)
    field = targets.schema.field(at)
    with pytest.raises(AssertionError, match=rule):
        check_targets(targets.set_column(at, field, pa.array(values, field.type)), maps, 1.0)
