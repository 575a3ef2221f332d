"""Chunks that one side begins with a blank of its own: the first of a text, and those behind an added token.

A capture is written with rows made by hand; whose mass lands where is then read off the targets.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from xtoken.pipeline.align.blanks import shifted_row
from xtoken.pipeline.align.checks import Rules, summary_batch
from xtoken.pipeline.align.chunks import join
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.prefix import first_tokens
from xtoken.pipeline.align.rows import Recipe, Rows
from xtoken.pipeline.align.stage import encode
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.project.build import build_w
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.topk import STEP
from xtoken.pipeline.store.codecs.topk import encode as pack
from xtoken.pipeline.store.writer import Sample, capture_batch
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.manifest import CodecInfo

LOSSES = ["p-kl", "h-kl", "gold", "uld", "alm", "strict", "mined", "byte-prefix"]
CODEC = CodecInfo(k=8, min_p=0.0, step=STEP)
Dist = dict[bytes, float]


def made(teacher: TextTokenizer, text: str, dists: dict[int, Dist]) -> pa.RecordBatch:
    """A capture's batch of one text seen behind BOS: row n is ``dists[n]``, a token of the text else."""
    encoded = teacher.encode(text, complete=False)
    known, size = teacher.table.by_bytes(), len(encoded.ids)
    ids, logprob = np.zeros((size, 3), np.int32), np.zeros((size, 3), np.float32)
    for row in range(size):
        others = [token for token in range(1000, 1010) if token not in encoded.ids]
        dist = dists.get(row)
        if dist is None:
            ids[row], logprob[row] = [encoded.ids[row], *others[:2]], [-1e-6, -20, -21]
        else:
            ids[row], logprob[row] = [known[piece] for piece in dist], [math.log(p) for p in dist.values()]
    realised = np.full(size, -1.0, np.float32)
    rows = TeacherRows(ids, logprob, realised, np.ones(size, np.int32), None, np.full(size, -2.0, np.float32))
    packed = pack(rows, k=8, min_p=0.0, vocab_size=teacher.table.size, step=STEP, temperatures=[])
    sample = Sample(
        sample_id="a#0",
        text=text,
        teacher_ids=encoded.ids,
        teacher_end=encoded.ends,
        packed=packed,
        realised_logprob=realised,
        space_logprob=rows.space_logprob,
        first_row=0,
        complete=False,
        snapped=encoded.snapped,
    )
    batch = capture_batch([sample], open_codec(CODEC).schema(), None)
    at = batch.schema.get_field_index("topk_codes")
    if at >= 0:
        batch = batch.rename_columns(["topk_ids" if name == "topk_codes" else name for name in batch.schema.names])
    return batch.append_column("teacher_eos", pa.array([False]))


@pytest.fixture(scope="module", params=["gemma3-llama2", "llama2-gemma3"])
def pair(request: pytest.FixtureRequest, tokenizer_file: Callable[[str], Path]) -> list[TextTokenizer]:
    """Teacher and student; Llama 2 puts a dummy space in front."""
    return [_load(tokenizer_file(name)) for name in request.param.split("-")]


@cache
def _load(path: Path) -> TextTokenizer:
    return load_tokenizer(str(path))


@cache
def _maps(teacher: TextTokenizer, student: TextTokenizer) -> Maps:
    phi_B = first_tokens(teacher.table, student)
    return Maps.of(build_w(student.table, teacher.table), "prefix", student.table, teacher.table, phi_B=phi_B)


def target_of(found: pa.RecordBatch, prefix: str, index: int) -> dict[int, float]:
    """id -> log-probability of the target of one chunk or token."""
    counts = found[f"{prefix}_count"][0].as_py()
    start = sum(counts[:index])
    span = slice(start, start + counts[index])
    ids, values = (found[f"{prefix}_{name}"][0].as_py()[span] for name in ("ids", "logprob"))
    return dict(zip(ids, values, strict=True))


def build(pair: list[TextTokenizer], batch: pa.RecordBatch, merge: str = "first") -> tuple[pa.RecordBatch, Any]:
    teacher, student = pair
    samples = join(batch, encode(student, batch), student.table.info.eos_id)
    maps = _maps(teacher, student)
    recipe = Recipe(LOSSES, merge, 1.0, CODEC)
    found, counts = target_batch(batch, samples, maps, recipe)
    Rules(maps, recipe).check(summary_batch(batch, samples, found, LOSSES))
    return found, counts


def share(target: dict[int, float], token: int) -> float:
    return math.exp(target[token]) if token in target else 0.0


STEMS = ("pkl", "gold", "strict", "mined", "prefix")


def columns(found: pa.RecordBatch) -> dict[str, dict[int, float]]:
    """The first chunk's target by loss; byte-prefix: its first token's."""
    hkl = by_names(found, ("hkl_common_count", "hkl_common_ids", "hkl_common_logprob"))
    return {"h-kl": hkl, **{loss: target_of(found, loss, 0) for loss in STEMS}}


@pytest.mark.thorough
def test_a_student_with_a_dummy_space(tokenizer_file: Callable[[str], Path]) -> None:
    teacher, student = _load(tokenizer_file("gemma3")), _load(tokenizer_file("llama2"))
    known = teacher.table.by_bytes()
    found, counts = build([teacher, student], made(teacher, "In 1998", {0: {b"The": 0.5, b"In": 0.25, b"\n": 0.005}}))
    realised, targets = found["student_ids"][0].as_py()[0], columns(found)
    assert counts["chunks_shifted"] == 1
    assert share(targets["pkl"], known[b" In"]) == pytest.approx(0.25, rel=0.02)
    assert share(targets["pkl"], known[b" The"]) == pytest.approx(0.5, rel=0.02)
    # no token is a blank and a line end: what begins so begins with the blank
    assert share(targets["pkl"], known[b" "]) == pytest.approx(0.005, rel=0.05)
    # one token on either side, so strict and mined have the target, too
    assert targets["mined"] == targets["pkl"]
    for loss in ("h-kl", "gold", "strict", "prefix"):
        assert share(targets[loss], realised) == pytest.approx(0.25, rel=0.02)
    # what compares no tokens is as the teacher said it
    assert found["uld_count"][0].as_py()[0] == 3
    assert found["teacher_logprob"][0].as_py()[0] == pytest.approx(-1.0)


def test_a_teacher_with_a_dummy_space(tokenizer_file: Callable[[str], Path]) -> None:
    teacher, student = _load(tokenizer_file("llama2")), _load(tokenizer_file("gemma3"))
    known = teacher.table.by_bytes()
    found, counts = build([teacher, student], made(teacher, "In 1998", {0: {b" The": 0.5, b" In": 0.25, b"In": 0.125}}))
    realised, targets = found["student_ids"][0].as_py()[0], columns(found)
    assert counts["chunks_shifted"] == 1
    # a text that begins with "In" begins so whether the dummy space was joined to it or not
    assert share(targets["pkl"], known[b"In"]) == pytest.approx(0.375, rel=0.02)
    assert share(targets["pkl"], known[b"The"]) == pytest.approx(0.5, rel=0.02)
    assert targets["mined"] == targets["pkl"]
    for loss in ("h-kl", "gold", "strict"):
        assert share(targets[loss], realised) == pytest.approx(0.375, rel=0.02)
    # behind the blank, as behind any byte that the teacher has begun
    assert share(targets["prefix"], realised) == pytest.approx(1 / 3, rel=0.02)


def test_a_word_that_the_teacher_has_with_a_blank_only(tokenizer_file: Callable[[str], Path]) -> None:
    teacher, student = _load(tokenizer_file("llama2")), _load(tokenizer_file("gemma3"))
    known, mine = teacher.table.by_bytes(), student.table.by_bytes()
    assert b"Although" not in known
    found, _ = build(
        [teacher, student], made(teacher, "Although", {0: {b" Although": 0.5, b" In": 0.25, b" The": 0.125}})
    )
    targets = columns(found)
    assert share(targets["prefix"], mine[b"Although"]) == pytest.approx(0.5 / 0.875, rel=0.02)
    # W spells the student's word with this piece
    assert share(targets["pkl"], known[b"Alt"]) == pytest.approx(0.5, rel=0.02)
    assert targets["h-kl"] == targets["gold"] == targets["strict"] == {}


def by_names(found: pa.RecordBatch, names: tuple[str, str, str]) -> dict[int, float]:
    count, ids, values = (found[name][0].as_py() for name in names)
    return dict(zip(ids[: count[0]], values[: count[0]], strict=True))


def test_a_mean_leaves_the_chunk_out(pair: list[TextTokenizer]) -> None:
    found, counts = build(pair, made(pair[0], "In 1998", {}), "mean")
    assert (counts["chunks_shifted"], found["pkl_count"][0].as_py()[0]) == (1, 0)
    assert found["pkl_count"][0].as_py()[1] > 0


@pytest.mark.thorough
def test_texts_whose_sides_begin_alike_are_not_touched(pair: list[TextTokenizer]) -> None:
    # a blank in the text, or a character that the dummy space cannot join: it is a token of its own then
    for text in (" In 1998", "\n1998"):
        _, counts = build(pair, made(pair[0], text, {}))
        assert counts["chunks_shifted"] == 0
    _, counts = build([pair[0], pair[0]], made(pair[0], "In 1998", {}))
    assert counts["chunks_shifted"] == 0


def test_a_blank_behind_an_added_token(tokenizer_file: Callable[[str], Path], tmp_path: Path) -> None:
    source = tokenizer_file("llama2")
    data = json.loads(source.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    data["added_tokens"].append({"id": len(data["model"]["vocab"]), "content": "<|im|>", **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text((source.parent / "tokenizer_config.json").read_text())
    marked, plain = _load(tmp_path), _load(source)
    _, counts = build([marked, plain], made(marked, "In<|im|>user\n<|im|> x", {}))
    # "user" only: both begin the text alike, and " x" has its own blank
    assert (counts["chunks_shifted"], counts["teacher_snapped"], counts["teacher_ends_moved"]) == (1, 1, 0)


def test_ids_that_meet_are_joined_and_the_lost_go_to_rest() -> None:
    to_K = np.array([3, 3, -1, -1], np.int32)
    p = np.array([0.1, 0.2, 0.3, 0.15])
    rows = Rows(np.array([0, 4]), np.arange(4, dtype=np.int32), np.log(p), np.log([0.25]), p)
    ids, logprob, rest = shifted_row(rows, 0, to_K)
    assert ids.tolist() == [3]
    assert np.exp(logprob) == pytest.approx([0.3])
    assert np.exp(rest) == pytest.approx(0.7)
    unknown = Rows(rows.offsets, rows.ids, rows.logprob, np.array([np.nan]), p)
    _, logprob, rest = shifted_row(unknown, 0, to_K)
    assert np.exp(logprob) == pytest.approx([1.0])
    assert np.isnan(rest)
    ids, _, rest = shifted_row(rows, 0, np.full(4, -1, np.int32))
    assert (len(ids), np.exp(rest)) == (0, pytest.approx(1.0))
