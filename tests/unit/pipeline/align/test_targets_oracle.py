"""Targets on real text and real tokenizers, against plain SQL over the same rows.

The toy teacher spreads its mass over the whole vocabulary, so the W of these tests is made to collide: two thirds of
the teacher's tokens are unreached and move onto forty others, some of them themselves kept.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from pipeline.align.checks import check_samples, check_targets
from pipeline.align.queries import query
from pipeline.align.stage import encode, read_part
from pipeline.align.targets import Joined, Maps, join, target_batch
from pipeline.capture import precompute
from pipeline.project import Projection, build_w
from pipeline.project.projection import EXACT, PIECES, TO_REST
from pipeline.store import load_vocab
from pipeline.tokens import TextTokenizer, load_tokenizer
from schemas.config import PrecomputeConfig
from schemas.manifest import CaptureManifest, TokenizerInfo, read_manifest
from schemas.progress import Silent

TEXT = (
    "Größe 12345, naïve façade — привет, мир! 東京タワーと नमस्ते दुनिया; 👩\u200d👩\u200d👧 🙂.\r\n"
    "def f(x):\n        return x ** 2  # <|endoftext|> <s>\n\n\nשלום مرحبا ﬁ ２\n"
)
LOSSES = ("p-kl", "h-kl")
STEP = 1 / 32


@pytest.fixture(scope="module", params=["smollm2", "llama2"])
def capture(
    request: pytest.FixtureRequest, tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """smollm2 shows its teacher no BOS (first_row 1), llama2 does and prepends a dummy space."""
    root = tmp_path_factory.mktemp("capture")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text(TEXT * 4, encoding="utf-8")
    (root / "text" / "b.txt").write_text("Plain words, and no more than that.", encoding="utf-8")
    config = PrecomputeConfig(
        corpus=str(root / "text"),
        teacher=str(tokenizer_file(request.param)),
        out=str(root / "c"),
        backend="fake",
        k=48,
        min_p=0.001,
        max_tokens=96,
    )
    precompute(config, Silent())
    return root / "c"


def colliding(student: TokenizerInfo, teacher: TokenizerInfo) -> Projection:
    """A W with many collisions: ids divisible by 3 are reached, the others move to 40 of them or to REST."""
    ids = np.arange(teacher.size, dtype=np.int32)
    reached, missing = ids[ids % 3 == 0], ids[ids % 3 != 0]
    row = (reached // 3 * 7 % student.size).astype(np.int32)
    order = np.argsort(row, kind="stable")
    return Projection(
        student_id=row[order],
        teacher_id=reached[order],
        weight=np.ones(len(row), np.float32),
        kind=np.where(reached[order] % 2, PIECES, EXACT).astype(np.int8),
        common=np.diff(row[order], prepend=-1) != 0,
        unreached=missing,
        moved_to=np.where(missing % 7 == 1, TO_REST, missing % 40 * 3).astype(np.int32),
        student=student,
        teacher=teacher,
    )


def aligned(
    capture: Path, student: TextTokenizer, projection: Projection, unreached: Any
) -> list[tuple[pa.RecordBatch, list[Joined], pa.RecordBatch, dict[str, int]]]:
    found = []
    for batch in read_part(str(capture), 0, "1GB", projection.teacher.eos_id):
        samples = join(batch, encode(student, batch), student.table.info.eos_id)
        check_samples(batch, samples)
        targets, counts = target_batch(batch, samples, Maps.of(projection, unreached), LOSSES, STEP)
        check_targets(targets, student.table.size, projection.teacher.size)
        found.append((batch, samples, targets, dict(counts)))
    return found


def rows_of(batch: pa.RecordBatch) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(entries, rest) of every chunk's row, decoded value by value; ``chunk`` is (sample, chunk) as one number."""
    entries, rest = [], []
    for at, row in enumerate(batch.to_pylist()):
        start = 0
        for number, kept in enumerate(row["kept"]):
            level = 0
            for t, gap in zip(
                row["topk_ids"][start : start + kept], row["topk_gap"][start : start + kept], strict=True
            ):
                level += gap
                entries.append({"chunk": (at, number), "teacher_id": t, "logprob": -level * STEP})
            start += kept
            gap = row["rest_gap"][number]
            rest.append({"chunk": (at, number), "logprob": -math.inf if gap == 65535 else -gap * STEP})
    return entries, rest


def first_rows(batch: pa.RecordBatch, samples: list[Joined]) -> list[tuple[int, int]]:
    """(sample, row) that each chunk starts with, row < 0 = none, without the code under test."""
    found = []
    for sample in samples:
        starts = [0, *sample.chunks.teacher_end[:-1].tolist()]
        first = batch["first_row"][sample.at].as_py()
        rows = [start - first for start in starts]
        if sample.chunks.lead:
            rows[0] = -1
        found += [(sample.at, row) for row in rows]
    return found


def sql(
    name: str, batch: pa.RecordBatch, chunks: list[tuple[int, int]], projection: Projection, **parameters: str
) -> list[list[tuple[int | None, float]]]:
    """Result of an oracle per chunk, as (id, logprob) in its order."""
    number = {row: at for at, row in enumerate(chunks) if row[1] >= 0}
    entries, rest = (
        [{**row, "chunk": number[row["chunk"]]} for row in rows if row["chunk"] in number] for rows in rows_of(batch)
    )
    w, unreached = projection.tables()
    with duckdb.connect() as connection:
        for table, value in (
            ("entries", pa.Table.from_pylist(entries)),
            ("rest", pa.Table.from_pylist(rest)),
            ("w", w),
            ("unreached", unreached),
        ):
            connection.register(table, value)
        found = connection.execute(query(name), parameters or None).fetchall()
    result: list[list[tuple[int | None, float]]] = [[] for _ in chunks]
    for chunk, token, logprob in found:
        result[chunk].append((token, logprob))
    return result


def flat(targets: pa.RecordBatch, name: str) -> list[Any]:
    values: list[Any] = targets[name].flatten().to_pylist()
    return values


def split(values: list[Any], counts: list[int]) -> list[list[Any]]:
    ends = np.cumsum([0, *counts]).tolist()
    assert ends[-1] == len(values)
    return [values[a:b] for a, b in pairwise(ends)]


@pytest.mark.parametrize("student", ["bytes", "smollm2", "llama2"])
@pytest.mark.parametrize("unreached", ["prefix", "rest", "none"])
def test_p_kl_targets_are_those_of_the_sql(
    capture: Path, tokenizer_file: Callable[[str], Path], student: str, unreached: str
) -> None:
    tokenizer = load_tokenizer(student if student == "bytes" else str(tokenizer_file(student)))
    projection = colliding(tokenizer.table.info, load_vocab(str(capture)).info)
    collided = 0
    for batch, samples, targets, _ in aligned(capture, tokenizer, projection, unreached):
        chunks = first_rows(batch, samples)
        oracle = sql("pkl", batch, chunks, projection, unreached=unreached)
        counts = flat(targets, "pkl_count")
        ids, logprobs = split(flat(targets, "pkl_ids"), counts), split(flat(targets, "pkl_logprob"), counts)
        for chunk, rest in enumerate(flat(targets, "pkl_rest_logprob")):
            expected = oracle[chunk] or [(None, 0.0)]
            assert ids[chunk] == [t for t, _ in expected[:-1]]
            assert logprobs[chunk] == pytest.approx([p for _, p in expected[:-1]], abs=2e-6)
            assert expected[-1] == (None, pytest.approx(rest, abs=2e-6))
            kept = batch["kept"][chunks[chunk][0]].as_py()[chunks[chunk][1]] if chunks[chunk][1] >= 0 else 0
            collided += len(ids[chunk]) < kept
    assert collided > 20


@pytest.mark.parametrize("student", ["bytes", "smollm2", "llama2"])
def test_h_kl_targets_are_those_of_the_sql(capture: Path, tokenizer_file: Callable[[str], Path], student: str) -> None:
    tokenizer = load_tokenizer(student if student == "bytes" else str(tokenizer_file(student)))
    projection = colliding(tokenizer.table.info, load_vocab(str(capture)).info)
    common_entries = 0
    for batch, samples, targets, _ in aligned(capture, tokenizer, projection, "prefix"):
        oracle = sql("hkl", batch, first_rows(batch, samples), projection)
        count, other_count = flat(targets, "hkl_common_count"), flat(targets, "hkl_other_count")
        ids, common = split(flat(targets, "hkl_common_ids"), count), split(flat(targets, "hkl_common_logprob"), count)
        others = split(flat(targets, "hkl_other_logprob"), other_count)
        for chunk, expected in enumerate(oracle):
            inside = [(s, p) for s, p in expected if s is not None]
            assert ids[chunk] == [s for s, _ in inside]
            assert common[chunk] == pytest.approx([p for _, p in inside], abs=2e-6)
            assert others[chunk] == pytest.approx([p for s, p in expected if s is None], abs=2e-6)
            common_entries += len(inside)
    assert common_entries or student == "bytes"


def test_real_w_on_real_text(capture: Path, tokenizer_file: Callable[[str], Path]) -> None:
    """Nothing in a P-KL target is unreached, the masses add up, and a chunk's sum is that of its tokens."""
    tokenizer, teacher = load_tokenizer(str(tokenizer_file("llama2"))), load_vocab(str(capture))
    projection = build_w(tokenizer.table, teacher)
    for batch, samples, targets, counts in aligned(capture, tokenizer, projection, "prefix"):
        assert set(flat(targets, "pkl_ids")) <= set(projection.teacher_id.tolist())
        mass = sum(value for name, value in counts.items() if name.startswith("mass_"))
        assert mass == pytest.approx(counts["chunks_with_row"] * 1e6, abs=5)
        assert counts["chunks_with_row"] == sum(row >= 0 for _, row in first_rows(batch, samples))
        for at, sample in enumerate(samples):
            _check_realised(batch, sample, targets["teacher_logprob"][at].as_py())


def _check_realised(batch: pa.RecordBatch, sample: Joined, found: list[float]) -> None:
    first, values = batch["first_row"][sample.at].as_py(), batch["realised_logprob"][sample.at].as_py()
    start = 0
    for chunk, end in enumerate(sample.chunks.teacher_end.tolist()):
        if start - first < 0 or (chunk == 0 and sample.chunks.lead):
            assert math.isnan(found[chunk])
        else:
            assert found[chunk] == pytest.approx(sum(values[start - first : end - first]), rel=1e-5)
        start = end


def test_same_tokenizer_moves_nothing(capture: Path) -> None:
    """Teacher and student alike: every chunk is one token on either side, and targets are the teacher's rows."""
    teacher = load_vocab(str(capture))
    tokenizer = load_tokenizer(read_manifest(str(capture), CaptureManifest).teacher.model)
    projection = build_w(tokenizer.table, teacher)
    for batch, samples, targets, counts in aligned(capture, tokenizer, projection, "prefix"):
        assert counts["chunks_1_1"] == counts["chunks"]
        assert counts["mass_pieces_ppm"] == 0
        complete = [batch["complete"][sample.at].as_py() for sample in samples]
        for sample, whole in zip(samples, complete, strict=True):
            assert int(sample.chunks.student_end[-1]) == len(sample.encoded.ids)
            assert bool(sample.encoded.ids[-1] == tokenizer.table.info.eos_id) == whole
        common = flat(targets, "hkl_common_count")
        assert sum(common) > 0


def test_all_mass_left_out_leaves_no_target() -> None:
    from pipeline.align.kernels import pkl_targets

    offsets, ids, logprob = np.array([0, 2]), np.array([1, 2], np.int32), np.log(np.array([0.5, 0.5]))
    route, column = np.array([0, -2, -2], np.int32), np.array([0, -1, -1], np.int8)
    rows = np.array([0, -1])
    count, ids, _, rest, mass = pkl_targets(rows, offsets, ids, logprob, np.array([-np.inf]), route, column)
    assert (count.tolist(), ids.tolist(), rest.tolist()) == ([0, 0], [], [0.0, 0.0])
    assert mass.tolist() == [[0, 0, 0, 1.0, 0], [0, 0, 0, 0, 0]]
