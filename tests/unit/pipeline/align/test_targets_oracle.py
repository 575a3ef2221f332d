"""Targets on real text and real tokenizers, against plain SQL over the same rows.

The toy teacher spreads its mass over the whole vocabulary, so the W of these tests is made to collide: two thirds of
the teacher's tokens are unreached and move onto forty others, some of them themselves kept.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from in_process import InProcess

from xtoken.pipeline.align.checks import Rules, summary_batch
from xtoken.pipeline.align.chunks import Joined, join
from xtoken.pipeline.align.kernels_project import project_rows
from xtoken.pipeline.align.maps import Maps, Routes
from xtoken.pipeline.align.parts import CaptureParts
from xtoken.pipeline.align.queries import query
from xtoken.pipeline.align.rows import Recipe
from xtoken.pipeline.align.stage import encode
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.project import Projection, build_w
from xtoken.pipeline.project.projection import EXACT, PIECES, TO_REST
from xtoken.pipeline.store.reader import load_vocab
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import CaptureManifest, CodecInfo, TokenizerInfo, read_manifest
from xtoken.schemas.ui.progress import Silent

TEXT = (
    "Größe 12345, naïve façade — привет, мир! 東京タワーと नमस्ते दुनिया; 👩\u200d👩\u200d👧 🙂.\r\n"
    "def f(x):\n        return x ** 2  # <|endoftext|> <s>\n\n\nשלום مرحبا ﬁ ２\n"
)
LOSSES = ("p-kl", "h-kl")
STEP = 1 / 32
TEMPERATURES = [2.0, 4.0]
# Values closer than this are one value twice, rounded apart: rows hold multiples of 1 / 32.
TIE = 1e-5


@pytest.fixture(scope="module", params=["smollm2", "llama2"])
def capture(
    request: pytest.FixtureRequest, tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """smollm2 shows its teacher no BOS (first_row 1), llama2 does and prepends a dummy space."""
    root = tmp_path_factory.mktemp("capture")
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text(TEXT * 4, encoding="utf-8")
    (root / "text" / "b.txt").write_text("Plain words, and no more than that.", encoding="utf-8")
    config = PrecomputeConfig.from_flat(
        corpus=str(root / "text"),
        teacher=str(tokenizer_file(request.param)),
        out=str(root / "c"),
        backend="fake",
        k=48,
        min_p=0.001,
        max_tokens=96,
        temperatures=TEMPERATURES,
    )
    precompute(config, Silent(), executor=InProcess())
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


def recipe(losses: Sequence[str] = LOSSES, merge: str = "first", tau: float = 1.0, known: bool = True) -> Recipe:
    temperatures = [1.0, *TEMPERATURES] if known else [1.0]
    return Recipe(losses, merge, tau, CodecInfo(k=48, min_p=0.001, step=STEP, temperatures=temperatures))


def aligned(
    capture: Path, student: TextTokenizer, projection: Projection, unreached: Any, made: Recipe | None = None
) -> list[tuple[pa.RecordBatch, list[Joined], pa.RecordBatch, dict[str, int]]]:
    found = []
    made = made or recipe()
    for batch in CaptureParts(str(capture), "1GB").read(0):
        samples = join(batch, encode(student, batch), student.table.info.eos_id)
        maps = Maps.of(projection, unreached, student.table)
        targets, counts = target_batch(batch, samples, maps, made)
        Rules(maps, made).check(summary_batch(batch, samples, targets, made.losses))
        found.append((batch, samples, targets, dict(counts)))
    return found


Entries = list[dict[str, Any]]


def rows_of(batch: pa.RecordBatch, tau: float) -> tuple[Entries, Entries]:
    """(entries, rest) of every row, decoded value by value; ``row`` is (sample, row)."""
    entries: Entries = []
    rest: Entries = []
    for at, row in enumerate(batch.to_pylist()):
        start = 0
        for number, kept in enumerate(row["kept"]):
            span, key = slice(start, start + kept), (at, number)
            levels = np.cumsum(row["topk_gap"][span]).tolist()
            gap = row["rest_gap"][number]
            if tau != 1:
                gap = row["tau_rest_odds"][len(TEMPERATURES) * number + TEMPERATURES.index(tau)]
            left = -math.inf if gap in (65535, -32768) else -gap * STEP
            if tau != 1 and left > -math.inf:
                left = -math.log1p(math.exp(left))  # from log(REST / kept) to log REST
            values = [-level * STEP / tau for level in levels]
            if tau != 1:
                scale = (1 - math.exp(left)) / sum(math.exp(value) for value in values)
                values = [value + math.log(scale) for value in values]
            ids = row["topk_ids"][span]
            entries += [{"row": key, "teacher_id": t, "logprob": v} for t, v in zip(ids, values, strict=True)]
            rest.append({"row": key, "logprob": left})
            start += kept
    return entries, rest


def spans(batch: pa.RecordBatch, samples: list[Joined]) -> list[tuple[int, int, int]]:
    """(sample, first row, row after the last) of each chunk, first row < 0 = none, without the code under test."""
    found = []
    for sample in samples:
        ends = sample.chunks.teacher_end.tolist()
        first = batch["first_row"][sample.at].as_py()
        rows = [(start - first, end - first) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if sample.chunks.gap[:1].any():
            rows[0] = (-1, rows[0][1])
        found += [(sample.at, *row) for row in rows]
    return found


def first_rows(batch: pa.RecordBatch, samples: list[Joined]) -> list[tuple[int, int]]:
    return [(at, start) for at, start, _ in spans(batch, samples)]


def run_sql(name: str, tables: dict[str, Any], **parameters: Any) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        for table, value in tables.items():
            connection.register(table, value)
        found: list[tuple[Any, ...]] = connection.execute(query(name), parameters or None).fetchall()
    return found


ROWS = pa.schema([("chunk", pa.int64()), ("row", pa.int64()), ("teacher_id", pa.int64()), ("logprob", pa.float64())])


def chunk_rows(batch: pa.RecordBatch, samples: list[Joined], made: Recipe, size: int) -> dict[str, pa.Table]:
    """The one row of each chunk, as the tables ``entries`` and ``rest`` of the oracles."""
    place: dict[tuple[int, int], tuple[int, int]] = {}
    for chunk, (at, start, end) in enumerate(spans(batch, samples)):
        wanted = {"first": range(start, start + 1), "last": range(end - 1, end), "mean": range(start, end)}[made.merge]
        place.update({(at, row): (chunk, row) for row in wanted if start >= 0})
    tables = {}
    for name, values in zip(("entries", "rest"), rows_of(batch, made.tau), strict=True):
        kept = [{**value, "chunk": place[value["row"]][0]} for value in values if value["row"] in place]
        tables[name] = pa.Table.from_pylist([{**value, "row": value["row"][1]} for value in kept], ROWS)
    if made.merge == "mean":
        found = run_sql("mean", tables, size=size)
        keys = ("chunk", "teacher_id", "logprob")
        rows = [dict(zip(keys, row, strict=True)) for row in found]
        tables["entries"] = pa.Table.from_pylist([row for row in rows if row["teacher_id"] is not None], ROWS)
        tables["rest"] = pa.Table.from_pylist([row for row in rows if row["teacher_id"] is None], ROWS)
    return tables


def by_chunk(found: list[tuple[Any, ...]], chunks: int) -> list[list[tuple[int | None, float]]]:
    """Result of an oracle per chunk, as (id, logprob) in its order."""
    result: list[list[tuple[int | None, float]]] = [[] for _ in range(chunks)]
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


def load(student: str, tokenizer_file: Callable[[str], Path]) -> TextTokenizer:
    return cached_tokenizer(student if student == "bytes" else str(tokenizer_file(student)))


cached_tokenizer = cache(load_tokenizer)
cached_vocab = cache(load_vocab)


PKL = [("first", 1.0, "prefix"), ("first", 1.0, "rest"), ("first", 1.0, "none"), ("mean", 1.0, "prefix")]
PKL += [("mean", 1.0, "rest"), ("first", 2.0, "prefix"), ("mean", 4.0, "none")]


@pytest.mark.parametrize("student", ["bytes", "llama2"])
@pytest.mark.parametrize(("merge", "tau", "unreached"), PKL)
def test_p_kl_targets_are_those_of_the_sql(
    capture: Path, tokenizer_file: Callable[[str], Path], student: str, merge: str, tau: float, unreached: str
) -> None:
    tokenizer = load(student, tokenizer_file)
    projection = colliding(tokenizer.table.info, cached_vocab(str(capture)).info)
    made = recipe(["p-kl"], merge, tau)
    joined = 0
    for batch, samples, targets, _ in aligned(capture, tokenizer, projection, unreached, made):
        tables = chunk_rows(batch, samples, made, projection.teacher.size)
        w, missing = projection.tables()
        found = run_sql(
            "pkl", {**tables, "w": w, "unreached": missing}, unreached=unreached, closed=made.merge == "mean"
        )
        oracle = by_chunk(found, len(spans(batch, samples)))
        counts = flat(targets, "pkl_count")
        ids, logprobs = split(flat(targets, "pkl_ids"), counts), split(flat(targets, "pkl_logprob"), counts)
        for chunk, rest in enumerate(flat(targets, "pkl_rest_logprob")):
            expected = oracle[chunk] or [(None, 0.0)]
            if merge == "mean" and oracle[chunk]:
                expected = [*expected, (None, -math.inf)]
            assert logprobs[chunk] == pytest.approx([p for _, p in expected[:-1]], abs=2e-6)
            assert in_order(zip(ids[chunk], logprobs[chunk], strict=True)) == in_order(expected[:-1])
            assert expected[-1][0] is None
            assert expected[-1][1] == pytest.approx(rest, abs=2e-6)
        entries = len(tables["entries"]) if merge == "first" else 0
        joined += entries - sum(counts)
    assert joined > 20 or merge == "mean"


def in_order(entries: Iterable[tuple[Any, float]]) -> list[list[int]]:
    """Ids grouped where log-probabilities are equal to rounding: the two sides may break such ties differently."""
    groups: list[list[int]] = []
    last = math.inf
    for token, logprob in entries:
        if last - logprob < TIE:
            groups[-1].append(token)
        else:
            groups.append([token])
        last = logprob
    return [sorted(group) for group in groups]


SPLITS = {
    "h-kl": ("hkl_common_count", "hkl_common_ids", "hkl_common_logprob", "hkl_other_count", "hkl_other_logprob"),
    "gold": ("gold_count", "gold_ids", "gold_logprob", "gold_other_count", "gold_other_logprob"),
    "uld": ("", "", "", "uld_count", "uld_logprob"),
}
SPLIT_CASES = [("h-kl", "first", 1.0), ("h-kl", "mean", 1.0), ("h-kl", "mean", 2.0), ("gold", "first", 1.0)]
SPLIT_CASES += [("gold", "last", 1.0), ("gold", "first", 4.0), ("uld", "first", 1.0), ("uld", "last", 2.0)]


def pairs_of(loss: str, projection: Projection) -> pa.Table:
    w = projection.tables()[0].to_pylist()
    kinds = {"h-kl": ("exact", "pieces", "role"), "gold": ("exact",), "uld": ()}[loss]
    chosen = [row for row in w if row["common"] and row["kind"] in kinds]
    schema = pa.schema([("teacher_id", pa.int64()), ("student_id", pa.int64())])
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in chosen], schema)


@pytest.mark.parametrize("student", ["bytes", "smollm2"])
@pytest.mark.parametrize(("loss", "merge", "tau"), SPLIT_CASES)
def test_split_targets_are_those_of_the_sql(
    capture: Path, tokenizer_file: Callable[[str], Path], student: str, loss: str, merge: str, tau: float
) -> None:
    tokenizer = load(student, tokenizer_file)
    projection = colliding(tokenizer.table.info, cached_vocab(str(capture)).info)
    made = recipe([loss], merge, tau)
    paired = 0
    for batch, samples, targets, _ in aligned(capture, tokenizer, projection, "prefix", made):
        tables = chunk_rows(batch, samples, made, projection.teacher.size)
        oracle = by_chunk(run_sql("split", {**tables, "pairs": pairs_of(loss, projection)}), len(spans(batch, samples)))
        count, ids, common, other_count, other = SPLITS[loss]
        others = split(flat(targets, other), flat(targets, other_count))
        for chunk, expected in enumerate(oracle):
            assert others[chunk] == pytest.approx([p for s, p in expected if s is None], abs=2e-6)
        if count:
            counts = flat(targets, count)
            mine, theirs = split(flat(targets, ids), counts), split(flat(targets, common), counts)
            for chunk, expected in enumerate(oracle):
                inside = [(s, p) for s, p in expected if s is not None]
                assert theirs[chunk] == pytest.approx([p for _, p in inside], abs=2e-6)
                assert in_order(zip(mine[chunk], theirs[chunk], strict=True)) == in_order(inside)
                paired += len(inside)
    assert paired or student == "bytes" or loss == "uld"


@pytest.mark.parametrize(("tau", "known"), [(1.0, True), (4.0, True), (1.5, False)])
def test_sparse_kl_is_the_teachers_row(capture: Path, tau: float, known: bool) -> None:
    teacher = cached_vocab(str(capture))
    tokenizer = cached_tokenizer(read_manifest(str(capture), CaptureManifest).teacher.model)
    projection = build_w(tokenizer.table, teacher)
    for batch, samples, targets, _ in aligned(
        capture, tokenizer, projection, "prefix", recipe(["sparse-kl"], "first", tau, known)
    ):
        rows: dict[tuple[int, int], dict[int, float]] = {}
        for value in rows_of(batch, tau if known else 1.0)[0]:
            rows.setdefault(value["row"], {})[value["teacher_id"]] = value["logprob"] / (1.0 if known else tau)
        rests = {value["row"]: value["logprob"] for value in rows_of(batch, tau)[1]} if known else {}
        counts = flat(targets, "skl_count")
        ids, logprobs = split(flat(targets, "skl_ids"), counts), split(flat(targets, "skl_logprob"), counts)
        for key, mine, values, rest in zip(
            first_rows(batch, samples), ids, logprobs, flat(targets, "skl_rest_logprob"), strict=True
        ):
            if key[1] < 0:
                assert (mine, rest) == ([], 0.0)
                continue
            row = rows[key]
            total = math.log(sum(map(math.exp, row.values())) + math.exp(rests.get(key, -math.inf)))
            assert dict(zip(mine, values, strict=True)) == pytest.approx(
                {t: p - total for t, p in row.items()}, abs=2e-6
            )
            assert values == sorted(values, reverse=True)
            assert math.isnan(rest) if not known else rest == pytest.approx(rests[key] - total, abs=2e-6)


def test_p_kl_where_rest_is_unknown(capture: Path, tokenizer_file: Callable[[str], Path]) -> None:
    """Entries sum to 1 after moving, and REST says that it is not known: NaN, checked for temperature 1."""
    tokenizer = load("smollm2", tokenizer_file)
    projection = colliding(tokenizer.table.info, cached_vocab(str(capture)).info)
    made = recipe(["p-kl"], tau=3.0, known=False)
    for batch, samples, targets, _ in aligned(capture, tokenizer, projection, "rest", made):
        counts, rests = flat(targets, "pkl_count"), flat(targets, "pkl_rest_logprob")
        logprobs = split(flat(targets, "pkl_logprob"), counts)
        for (_, row), count, values, rest in zip(first_rows(batch, samples), counts, logprobs, rests, strict=True):
            assert math.isnan(rest) == (count > 0)
            assert row >= 0 or count == 0
            assert not count or sum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)
        maps = Maps.of(projection, "rest", tokenizer.table)
        known = recipe(["p-kl"], tau=2.0)
        with pytest.raises(VerificationError, match="pkl_rest_logprob is NaN where the tail mass is known"):
            Rules(maps, known).check(summary_batch(batch, samples, targets, ["p-kl"]))


def test_real_w_on_real_text(capture: Path, tokenizer_file: Callable[[str], Path]) -> None:
    """Nothing in a P-KL target is unreached, the masses add up, and a chunk's sum is that of its tokens."""
    tokenizer, teacher = cached_tokenizer(str(tokenizer_file("llama2"))), cached_vocab(str(capture))
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
        if start - first < 0 or sample.chunks.gap[chunk]:
            assert math.isnan(found[chunk])
        else:
            assert found[chunk] == pytest.approx(sum(values[start - first : end - first]), rel=1e-5)
        start = end


def test_same_tokenizer_moves_nothing(capture: Path) -> None:
    """Teacher and student alike: every chunk is one token on either side, and targets are the teacher's rows."""
    teacher = cached_vocab(str(capture))
    tokenizer = cached_tokenizer(read_manifest(str(capture), CaptureManifest).teacher.model)
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
    offsets, ids, p = np.array([0, 2]), np.array([1, 2], np.int32), np.array([0.5, 0.5])
    routes = Routes.of(np.array([0, -2, -2], np.int32), np.array([0, -1, -1], np.int8))
    kept = (offsets, ids, np.log(p), p, np.array([-np.inf]))
    count, ids, _, rest, mass = project_rows(np.array([0, -1]), *kept, *routes, False, 2)
    assert (count.tolist(), ids.tolist(), rest.tolist()) == ([0, 0], [], [0.0, 0.0])
    assert mass.tolist() == [[0, 0, 0, 1.0, 0], [0, 0, 0, 0, 0]]
