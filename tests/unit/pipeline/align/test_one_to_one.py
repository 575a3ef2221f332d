"""Strict and mined on real text: their targets against the stored rows, said with dictionaries; W; what is refused."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import InThisProcess

from xtoken.pipeline.align.chunks import join
from xtoken.pipeline.align.encoding import encode
from xtoken.pipeline.align.maps import Maps, twins
from xtoken.pipeline.align.parts import CaptureParts
from xtoken.pipeline.align.rows import Recipe
from xtoken.pipeline.align.run import align
from xtoken.pipeline.align.targets import target_batch
from xtoken.pipeline.page.data import sample_data
from xtoken.pipeline.page.sample import load_sample
from xtoken.pipeline.project import build_w, project, read_projection
from xtoken.pipeline.project.projection import TO_REST, Projection
from xtoken.pipeline.query import query
from xtoken.pipeline.store.reader import iter_targets, load_vocab
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.tokens import TokenTable, load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig, InspectConfig, ProjectConfig, QueryConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.thorough  # real models and tokenizers, for minutes
TEXTS = {
    "a.txt": "The quick brown fox, 12345 jumps; naïve café — привет, мир! def f(x): return x ** 2\n" * 4,
    "b.txt": "Wholesale roviral keyframes: ossils of 2048 hematical " * 6,
}
STEP = 1 / 32
CLOSE = 2e-6  # float32 of numbers of size 10, relative
Target = tuple[dict[int, float], float]


@pytest.fixture(scope="module")
def capture(small_capture: Callable[..., Path]) -> Path:
    """The fake teacher of Gemma-3's tokens, 48 entries a row; read only."""
    return small_capture(TEXTS, "gemma3", k=48, min_p=0.001, temperatures=[2.0])


@pytest.fixture(scope="module")
def student_file(tokenizer_file: Callable[[str], Path]) -> str:
    return str(tokenizer_file("smollm2"))


@pytest.fixture(scope="module")
def strict_targets(capture: Path, student_file: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return aligned(capture, student_file, tmp_path_factory.mktemp("strict") / "t", ["gold", "strict"])


@pytest.fixture(scope="module")
def mined_targets(capture: Path, student_file: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return aligned(capture, student_file, tmp_path_factory.mktemp("mined") / "t", ["strict", "mined"])


def aligned(capture: Path, student: str, out: Path, losses: list[str], **options: Any) -> str:
    config = AlignConfig(captures=[str(capture)], student=student, out=str(out), losses=losses, **options)
    align(config, Silent(), executor=InThisProcess())
    return str(out)


def rows_of(folder: str | Path) -> list[dict[str, Any]]:
    return [row for batch in iter_targets(str(folder)) for row in batch.to_pylist()]


def distributions(capture: Path) -> dict[str, tuple[int, list[Target]]]:
    """By sample: tokens before the first row, and each row's probabilities by teacher id with the tail mass."""
    vocab = pq.read_table(capture / "vocab.parquet")
    token_of = dict(zip(vocab["code"].to_pylist(), vocab["token_id"].to_pylist(), strict=True))
    found = {}
    for row in pq.read_table(capture / "data").to_pylist():
        rows, start = [], 0
        for kept, gap in zip(row["kept"], row["rest_gap"], strict=True):
            span = slice(start, start + kept)
            p = np.exp(-STEP * np.cumsum(row["topk_gap"][span]))
            tail = 0.0 if gap == 65535 else math.exp(-gap * STEP)
            total = float(p.sum()) + tail
            ids = [token_of[code] for code in row["topk_codes"][span]]
            rows.append((dict(zip(ids, (p / total).tolist(), strict=True)), tail / total))
            start += kept
        found[row["sample_id"]] = (row["first_row"], rows)
    return found


def chunks_of(row: dict[str, Any], first_row: int) -> list[tuple[bool, int]]:
    """Whether each chunk is one token on either side, and its row (negative = none)."""
    mine, theirs = (list(pairwise([0, *row[f"chunk_{side}_end"]])) for side in ("student", "teacher"))
    return [(b - a == 1 == d - c, c - first_row) for (a, b), (c, d) in zip(mine, theirs, strict=True)]


def targets_of(row: dict[str, Any], stem: str) -> list[dict[int, float]]:
    """Each chunk's log-probabilities by id, in their order."""
    spans = pairwise(np.cumsum([0, *row[f"{stem}_count"]]).tolist())
    return [dict(zip(row[f"{stem}_ids"][a:b], row[f"{stem}_logprob"][a:b], strict=True)) for a, b in spans]


def twins_by_hand(student: TokenTable, teacher: TokenTable) -> dict[int, int]:
    """Student token by teacher token: of equal bytes, or the eos and end of turn of both."""
    mine, theirs = student.by_bytes(), teacher.by_bytes()
    pairs = {t: mine[text] for text, t in theirs.items() if text in mine}
    stops = [(student.id_of(role), teacher.id_of(role)) for role in ("eos", "eot")]
    return pairs | {t: s for s, t in stops if s is not None and t is not None}


def test_strict_targets_are_the_teachers_entries_of_equal_bytes(
    capture: Path, student_file: str, strict_targets: str
) -> None:
    student, teacher = load_tokenizer(student_file).table, load_vocab(str(capture))
    twin, stored, seen = twins_by_hand(student, teacher), distributions(capture), {"targets": 0, "one": 0, "more": 0}
    for row in rows_of(strict_targets):
        first_row, rows = stored[row["sample_id"]]
        for (single, at), found in zip(chunks_of(row, first_row), targets_of(row, "strict"), strict=True):
            inside = {} if at < 0 else {twin[t]: p for t, p in rows[at][0].items() if t in twin}
            if not single or len(inside) < 2:
                assert found == {}
                seen["more" if not single else "one"] += 1
                continue
            assert found == pytest.approx({s: math.log(p) for s, p in inside.items()}, abs=STEP)
            assert list(found.values()) == sorted(found.values(), reverse=True)
            assert sum(map(math.exp, found.values())) < math.exp(STEP / 2)
            seen["targets"] += 1
    manifest = read_manifest(strict_targets, TargetManifest)
    assert sum(part.counts["strict_chunks"] for part in manifest.parts) == seen["targets"] > 50
    assert seen["more"] > 10


def test_the_stop_pair_stays_in(capture: Path, student_file: str) -> None:
    """Every row gets eos for its second entry and bos for its third: one is an entry of every target, the other of
    none. The chunk of both eos has a target, like any other of one token.
    """
    tokenizer, teacher = load_tokenizer(student_file), load_vocab(str(capture))
    maps = Maps.of(build_w(tokenizer.table, teacher), "prefix", tokenizer.table, teacher)
    made = Recipe(["strict"], "first", 1.0, read_manifest(str(capture), CaptureManifest).codec)
    eos, closed, others = tokenizer.table.info.eos_id, list[int](), set[str | None]()
    for batch in CaptureParts(str(capture), "1GB").read(0):
        changed = with_specials(batch, teacher)
        samples = join(changed, encode(tokenizer, changed), eos)
        targets, _ = target_batch(changed, samples, maps, made)
        for sample, row in zip(samples, targets.to_pylist(), strict=True):
            found = [target for target in targets_of(row, "strict") if target]
            assert all(eos in target for target in found)
            others |= {tokenizer.table.role[s] for target in found for s in target if s != eos}
            if batch["complete"][sample.at].as_py():
                assert row["student_ids"][-1] == eos
                closed.append(row["strict_count"][-1])
    assert max(closed) > 1
    assert others == {None}


def with_specials(batch: pa.RecordBatch, teacher: TokenTable) -> pa.RecordBatch:
    """The second and the third entry of every row that has them are eos and bos."""
    ids, rows = [], batch.to_pylist()
    for row in rows:
        mine, start = row["topk_ids"], 0
        for kept in row["kept"]:
            specials = [teacher.info.eos_id, teacher.id_of("bos")][: max(0, kept - 1)]
            mine[start + 1 : start + 1 + len(specials)] = specials
            start += kept
        ids.append(mine)
    at = batch.schema.get_field_index("topk_ids")
    field = batch.schema.field(at)
    return batch.set_column(at, field, pa.array(ids, field.type))


def test_twins_do_not_ask_for_the_common_set(toy: Callable[..., TokenTable]) -> None:
    """The teacher's a is nearest to the student's aa, of lower id and weight 1 as well: its twin is a all the same. Of
    two students of equal bytes the ordinary one counts; bos is no twin, eos and end of turn are.
    """
    roles = ["bos", "eos", "eot"]
    student, teacher = toy([b"aa", b"a", b"b", b"b"], specials=roles), toy([b"a", b"b"], specials=roles)
    projection = build_w(student, teacher)
    assert projection.matched_student().tolist()[0] == -1, "this is what gold sees"
    assert twins(projection, student).tolist() == [1, 2, -1, 5, 6]
    fallback = TokenTable.build(
        student.pieces(), student.role, [False, False, True, *[False] * 4], student.merges, name="f", kind="metaspace"
    )
    assert twins(projection, fallback).tolist() == [1, 3, -1, 5, 6]


@pytest.fixture
def toy() -> Callable[..., TokenTable]:
    def make(pieces: list[bytes], specials: list[str]) -> TokenTable:
        roles = [*[None] * len(pieces), *specials]
        none = np.zeros((0, 2), np.int32)
        whole = [*pieces, *[b""] * len(specials)]
        return TokenTable.build(whole, roles, [False] * len(whole), none, name="toy", kind="byte-level")

    return make


def routed(p: dict[int, float], tail: float, projection: Projection) -> Target:
    """A row after unreached mass moved to its prefix, else to the tail mass."""
    moved_to = dict(zip(projection.unreached.tolist(), projection.moved_to.tolist(), strict=True))
    found: dict[int, float] = {}
    for t, mass in p.items():
        to = moved_to.get(t, t)
        if to == TO_REST:
            tail += mass
        else:
            found[to] = found.get(to, 0.0) + mass
    return found, tail


def test_mined_targets_are_rows_through_a_w_of_least_edit_distance(
    capture: Path, student_file: str, mined_targets: str
) -> None:
    student, teacher = load_tokenizer(student_file).table, load_vocab(str(capture))
    projection, stored = build_w(student, teacher, "mined"), distributions(capture)
    assert read_manifest(mined_targets, TargetManifest).w_hash == projection.hash != build_w(student, teacher).hash
    filled = other = 0
    for row in rows_of(mined_targets):
        first_row, rows = stored[row["sample_id"]]
        chunks = zip(chunks_of(row, first_row), targets_of(row, "mined"), row["mined_rest_logprob"], strict=True)
        for (single, at), found, tail_logp in chunks:
            if not single or at < 0:
                assert (found, tail_logp) == ({}, 0.0)
                other += 1
                continue
            expected, tail = routed(*rows[at], projection)
            assert found == pytest.approx({t: math.log(p) for t, p in expected.items()}, abs=STEP)
            assert math.exp(tail_logp) == pytest.approx(tail, rel=STEP, abs=CLOSE)
            filled += 1
    manifest = read_manifest(mined_targets, TargetManifest)
    assert sum(part.counts["mined_chunks"] for part in manifest.parts) == filled > 50
    assert other > 10


def test_strict_is_the_same_beside_mined(strict_targets: str, mined_targets: str) -> None:
    """Tokens of equal bytes do not depend on the rule of W."""
    pairs = zip(rows_of(strict_targets), rows_of(mined_targets), strict=True)
    assert all(targets_of(one, "strict") == targets_of(other, "strict") for one, other in pairs)


def test_w_is_built_by_the_rule_that_the_losses_need(capture: Path, student_file: str, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match="p-kl through one of rule pieces and mined through one of rule mined"):
        aligned(capture, student_file, tmp_path / "both", ["p-kl", "mined"])
    assert not (tmp_path / "both").exists()
    config = ProjectConfig(student=student_file, teacher=str(capture), out=str(tmp_path / "pieces"))
    project(config, Silent())
    with pytest.raises(XtokenError, match=r"least edit distance, and .*pieces is of rule 'pieces'; leave --w out"):
        aligned(capture, student_file, tmp_path / "t", ["mined"], w=str(tmp_path / "pieces"))
    project(config.model_copy(update={"out": str(tmp_path / "mined"), "rule": "mined"}), Silent())
    given = str(tmp_path / "mined")
    out = aligned(capture, student_file, tmp_path / "given", ["p-kl", "mined"], w=given)
    assert read_manifest(out, TargetManifest).w_hash == read_projection(given).hash


@pytest.mark.parametrize(("loss", "reason"), [("strict", "renormalises over what was sampled"), ("mined", "the label")])
def test_samples_cannot_serve_them(
    small_capture: Callable[..., Path], student_file: str, tmp_path: Path, loss: str, reason: str
) -> None:
    drawn = small_capture(TEXTS, "smollm2", codec="sampled", draws=20)
    with pytest.raises(XtokenError, match=f"--for {loss} .*{reason}.*capture with --codec topk"):
        aligned(drawn, student_file, tmp_path / "t", [loss])


def test_temperatures(capture: Path, student_file: str, tmp_path: Path) -> None:
    """strict needs no tail mass and serves every temperature; mined needs it and says so. At the same scale the order
    of entries and the support stay.
    """
    with pytest.raises(XtokenError, match="mined at --tau 3 needs the tail mass"):
        aligned(capture, student_file, tmp_path / "no", ["mined"], tau=3.0)
    cold = aligned(capture, student_file, tmp_path / "1", ["strict"])
    hot = aligned(capture, student_file, tmp_path / "3", ["strict"], tau=3.0)
    aligned(capture, student_file, tmp_path / "2", ["mined"], tau=2.0)
    assert verify(str(tmp_path / "2"))["samples"] == len(rows_of(cold))
    for one, other in zip(rows_of(cold), rows_of(hot), strict=True):
        for first, second in zip(targets_of(one, "strict"), targets_of(other, "strict"), strict=True):
            assert first.keys() == second.keys()
            if first:
                ids, one_p, other_p = list(first), np.array([*first.values()]), np.array([second[s] for s in first])
                # log-ratios over tau, to half a step: what renormalising leaves
                assert other_p - other_p[0] == pytest.approx((one_p - one_p[0]) / 3, abs=2**-11 + 1e-5), ids


def test_the_same_bytes_again(capture: Path, student_file: str, mined_targets: str, tmp_path: Path) -> None:
    again = aligned(capture, student_file, tmp_path / "again", ["strict", "mined"])
    names = [path.relative_to(again) for path in Path(again).rglob("*.parquet")]
    assert len(names) > 3
    assert all(Path(again, name).read_bytes() == Path(mined_targets, name).read_bytes() for name in names)


def test_views_show_their_entries(mined_targets: str) -> None:
    rows = query(QueryConfig(path=mined_targets, sql="SELECT sum(probability) AS p, count(*) AS n FROM mined_entries"))
    stored = [p for row in rows_of(mined_targets) for target in targets_of(row, "mined") for p in target.values()]
    assert rows["rows"][0]["n"] == len(stored)
    assert rows["rows"][0]["p"] == pytest.approx(sum(map(math.exp, stored)), rel=1e-5)
    asked = "SELECT DISTINCT token FROM strict_entries ORDER BY ALL LIMIT 3"
    assert len(query(QueryConfig(path=mined_targets, sql=asked))["rows"]) == 3


def test_a_page_draws_them(capture: Path, mined_targets: str) -> None:
    sample = load_sample(InspectConfig(path=mined_targets, html="a.txt:0#0", capture=str(capture)))
    data, row = sample_data(sample), next(row for row in rows_of(mined_targets) if row["sample_id"] == "a.txt:0#0")
    assert data["layout"]["strict"] == {"axis": "chunk", "parts": [["tokens", "s"]], "moved": False}
    assert data["layout"]["mined"] == {"axis": "chunk", "parts": [["tokens", "t"], ["tail", ""]], "moved": True}
    for stem, side in (("strict", "student"), ("mined", "teacher")):
        for (places, *_), target in zip(data["targets"][stem], targets_of(row, stem), strict=True):
            assert [data[side][place][0] for place in places] == list(target)
