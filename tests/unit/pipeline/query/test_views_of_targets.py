"""Views of targets and the named questions, against slow loops over the files themselves."""

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.store.reader import iter_targets
from xtoken.schemas.categories import category
from xtoken.schemas.errors import XtokenError

from .conftest import TEXTS, aligned, ask


def stored(root: Path) -> list[dict[str, Any]]:
    """Samples of a capture as they lie on disk, or of targets as readers see them."""
    if (root / "w.parquet").exists():
        return [row for batch in iter_targets(str(root)) for row in batch.to_pylist()]
    return [row for path in sorted((root / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def table(root: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(root / name).to_pylist()
    return rows


def texts(capture: Path) -> dict[str, bytes]:
    return {row["sample_id"]: row["text"].encode() for row in stored(capture)}


def slow_chunks(capture: Path, targets: Path) -> Iterator[dict[str, Any]]:
    """Chunks with text, cut anew where both sides end a token at the same byte."""
    teacher = {row["sample_id"]: row for row in stored(capture)}
    for sample in stored(targets):
        theirs = teacher[sample["sample_id"]]
        text, first = theirs["text"].encode(), theirs["first_row"]
        last_s = {end: pos + 1 for pos, end in enumerate(sample["student_end"])}
        last_t = {end: pos + 1 for pos, end in enumerate(theirs["teacher_end"])}
        # eos is 0 bytes wide and stands alone
        eos_s = len(sample["student_end"]) > 1 and sample["student_end"][-1] == sample["student_end"][-2]
        eos_t = len(theirs["teacher_end"]) > 1 and theirs["teacher_end"][-1] == theirs["teacher_end"][-2]
        cuts = [0, *sorted(set(last_s) & set(last_t))]
        for start, end in pairwise(cuts):
            s, t = (last_s.get(start, 0), last_s[end]), (last_t.get(start, 0), last_t[end])
            if end == cuts[-1]:
                s, t = (s[0], s[1] - eos_s), (t[0], t[1] - eos_t)
            rows = theirs["realised_logprob"]
            known = t[0] >= first
            yield {
                "sample_id": sample["sample_id"],
                "text": text[start:end],
                "student_tokens": s[1] - s[0],
                "teacher_tokens": t[1] - t[0],
                "logprob": sum(rows[pos - first] for pos in range(*t)) if known else None,
                "start_byte": start,
            }


def test_chunks(capture: Path, targets: Path) -> None:
    found = ask(targets, "FROM chunks WHERE kind = 'text'")
    for row, expected in zip(found, slow_chunks(capture, targets), strict=True):
        assert (row["sample_id"], row["start_byte"]) == (expected["sample_id"], expected["start_byte"])
        assert row["text"] == expected["text"].decode("utf-8", "backslashreplace")
        assert row["student_tokens"] == row["student_end"] - row["student_start"] == expected["student_tokens"]
        assert row["teacher_tokens"] == row["teacher_end"] - row["teacher_start"] == expected["teacher_tokens"]
        assert row["one_to_one"] == (row["student_tokens"] == row["teacher_tokens"] == 1)
        if expected["logprob"] is None:
            assert row["teacher_logprob"] is None
            assert row["bits_per_byte"] is None
        else:
            assert row["teacher_logprob"] == pytest.approx(expected["logprob"], rel=1e-5)
            bits = -expected["logprob"] / math.log(2) / len(expected["text"])
            assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert ask(targets, "SELECT count(*) AS n FROM chunks WHERE kind = 'eos'") == [{"n": len(TEXTS)}]


def test_chunks_of_bytes_split_characters(capture: Path, byte_targets: Path) -> None:
    tokens = ask(byte_targets, "SELECT string_agg(text, '' ORDER BY chunk) AS text, sample_id FROM chunks GROUP BY ALL")
    for row in tokens:
        raw = row["text"].encode("latin-1", "backslashreplace") if "\\x" not in row["text"] else None
        assert raw is None or row["text"].encode() == texts(capture)[row["sample_id"]]
    assert ask(byte_targets, "SELECT count(*) AS n FROM chunks WHERE text LIKE '\\x%'")[0]["n"] > 0


def test_samples_and_tokens_spell_the_text(capture: Path, targets: Path, byte_targets: Path) -> None:
    for root in (targets, byte_targets):
        for row in ask(root, "FROM samples"):
            assert row["text"].encode() == texts(capture)[row["sample_id"]]
        counted = ask(root, "SELECT sum(student_tokens) AS n, sum(chunks) AS c FROM samples")[0]
        assert ask(root, "SELECT count(*) AS n FROM student_tokens") == [{"n": counted["n"]}]
        assert ask(root, "SELECT count(*) AS c FROM chunks") == [{"c": counted["c"]}]
    join = """
        SELECT count(*) AS bad FROM student_tokens AS t JOIN chunks AS c USING (sample_id, chunk)
        WHERE t.pos < c.student_start OR t.pos >= c.student_end
    """
    assert ask(targets, join) == [{"bad": 0}]


def test_bits_per_byte_of_samples_are_the_captures(capture: Path, targets: Path) -> None:
    query = """
        SELECT max(abs(s.nats - t.nats)) AS off, count(*) AS n
        FROM samples AS s JOIN teacher_samples AS t USING (sample_id)
        WHERE s.bytes = t.bytes AND t.first_row = 0
    """
    assert ask(targets, query, capture)[0] == {"off": None, "n": 0}, "the fake teacher sees no BOS"
    query = """
        SELECT s.sample_id, s.nats, sum(-t.logprob) AS nats_of_tokens
        FROM samples AS s JOIN chunk_tokens AS t USING (sample_id) JOIN chunks AS c USING (sample_id, chunk)
        WHERE c.teacher_logprob IS NOT NULL GROUP BY ALL
    """
    for row in ask(targets, query, capture):
        assert row["nats"] == pytest.approx(row["nats_of_tokens"], rel=1e-5)


def test_alignment_by_source(capture: Path, targets: Path) -> None:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for chunk in slow_chunks(capture, targets):
        source = chunk["sample_id"].rpartition("#")[0]
        groups[source.rpartition("/")[0] or source].append(chunk)
    eos = ask(targets, "SELECT source, count(*) AS n FROM chunks WHERE kind = 'eos' GROUP BY source")
    of_eos = {row["source"]: row["n"] for row in eos}
    found = {row["source"]: row for row in ask(targets, "FROM alignment_by_source")}
    assert set(found) == set(groups) == set(of_eos)
    for source, chunks in groups.items():
        row, n = found[source], len(chunks) + of_eos[source]
        size = sum(len(chunk["text"]) for chunk in chunks)
        student = sum(chunk["student_tokens"] for chunk in chunks) + of_eos[source]
        teacher = sum(chunk["teacher_tokens"] for chunk in chunks) + of_eos[source]
        pairs = sum(chunk["student_tokens"] == chunk["teacher_tokens"] == 1 for chunk in chunks) + of_eos[source]
        assert (row["chunks"], row["bytes"]) == (n, size)
        assert row["one_to_one"] == pytest.approx(pairs / n)
        assert row["student_tokens_per_chunk"] == pytest.approx(student / n)
        assert row["teacher_tokens_per_chunk"] == pytest.approx(teacher / n)
        assert row["bytes_per_student_token"] == pytest.approx(size / student)
        assert row["bytes_per_teacher_token"] == pytest.approx(size / teacher)
        assert row["samples"] == len({chunk["sample_id"] for chunk in chunks})
    whole = ask(targets, "SELECT sum(counts['chunks']) AS n, sum(counts['chunks_1_1']) AS pairs FROM parts")[0]
    asked = "SELECT sum(chunks)::BIGINT AS n, round(sum(chunks * one_to_one))::BIGINT AS pairs FROM alignment_by_source"
    assert ask(targets, asked) == [whole]


def test_disagreements(capture: Path, targets: Path) -> None:
    expected = [chunk for chunk in slow_chunks(capture, targets) if chunk["logprob"] is not None]
    expected.sort(key=lambda chunk: chunk["logprob"])
    found = ask(targets, "FROM disagreements LIMIT 20")
    assert [row["bits"] for row in found] == pytest.approx(
        [-chunk["logprob"] / math.log(2) for chunk in expected[:20]], rel=1e-5
    )
    for row in found:
        text = texts(capture)[row["sample_id"]]
        start, end = row["start_byte"], row["start_byte"] + len(row["text"].encode())
        before, after = text[max(0, start - 60) : start], text[end : end + 60]
        if "\\x" not in row["text"]:
            assert text[start:end].decode() == row["text"]
            assert row["before"] == before.decode("utf-8", "backslashreplace")
            assert row["after"] == after.decode("utf-8", "backslashreplace")
        assert row["probability"] == pytest.approx(2.0 ** -row["bits"])


def test_never_reached_by_w(targets: Path) -> None:
    mass: dict[int, float] = defaultdict(float)
    seen: dict[int, int] = defaultdict(int)
    for sample in stored(targets):
        for token, logprob in zip(sample["pkl_ids"], sample["pkl_logprob"], strict=True):
            mass[token] += math.exp(logprob)
        for token in sample["student_ids"]:
            seen[token] += 1
    reached: dict[int, float] = defaultdict(float)
    for entry in table(targets, "w.parquet"):
        reached[entry["student_id"]] += entry["weight"] * mass[entry["teacher_id"]]
    roles = {row["token_id"]: row["role"] for row in table(targets, "student_vocab.parquet")}
    expected = {token for token, role in roles.items() if role != "hole" and reached[token] == 0}
    total = ask(targets, "SELECT count(*) AS n FROM never_reached")[0]["n"]
    assert total == len(expected)
    first = ask(targets, "FROM never_reached LIMIT 3000")
    assert {row["student_id"] for row in first} <= expected
    assert [row["seen"] for row in first] == sorted((seen[token] for token in expected), reverse=True)[:3000]


def test_never_reached_by_h_kl(byte_targets: Path) -> None:
    given = {token for sample in stored(byte_targets) for token in sample["hkl_common_ids"]}
    roles = {row["token_id"]: row["role"] for row in table(byte_targets, "student_vocab.parquet")}
    found = {row["student_id"] for row in ask(byte_targets, "FROM never_reached")}
    assert found == {token for token, role in roles.items() if role != "hole"} - given


def test_never_reached_by_a_student_of_the_teachers_tokenizer(same_targets: Path) -> None:
    given = {token for sample in stored(same_targets) for token in sample["skl_ids"]}
    size = len(table(same_targets, "student_vocab.parquet"))
    holes = ask(same_targets, "SELECT count(*) AS n FROM student_vocab WHERE role = 'hole'")[0]["n"]
    assert ask(same_targets, "SELECT count(*) AS n FROM never_reached") == [{"n": size - holes - len(given)}]


def test_never_reached_needs_a_loss_that_names_tokens(capture: Path, tmp_path: Path) -> None:
    found = aligned(capture, "bytes", ["uld"], tmp_path / "uld")
    with pytest.raises(XtokenError, match=r"never_reached is not here: it reads the columns of loss p-kl"):
        ask(found, "FROM never_reached")
    factors = [value for sample in stored(found) for value in sample["factor_logprob"]]
    values = [row["factor_logprob"] for row in ask(found, "FROM uld_chunk_values LIMIT 100000")]
    assert values == [value if math.isfinite(value) else None for value in factors]


def test_coverage_by_category(capture: Path, targets: Path) -> None:
    vocab = {row["token_id"]: row for row in table(capture, "vocab.parquet")}
    id_of_code = {row["code"]: token for token, row in vocab.items()}
    exact = {row["teacher_id"] for row in table(targets, "w.parquet") if row["kind"] in ("exact", "role")}
    pieces = {row["teacher_id"] for row in table(targets, "w.parquet")} - exact
    moved = {row["teacher_id"] for row in table(targets, "unreached.parquet") if row["moved_to"] is not None}
    share: dict[tuple[str, str], float] = defaultdict(float)
    rest = 0.0
    for sample in stored(capture):
        rest += sum(0.0 if gap == 65535 else math.exp(-gap / 32) for gap in sample["rest_gap"])
        at = 0
        for kept in sample["kept"]:
            level = 0
            for code, gap in zip(sample["topk_codes"][at : at + kept], sample["topk_gap"][at : at + kept], strict=True):
                level += gap
                token = id_of_code[code]
                kind = category(vocab[token]["bytes"], vocab[token]["role"])
                way = (
                    "exact"
                    if token in exact
                    else "pieces"
                    if token in pieces
                    else "moved"
                    if token in moved
                    else "lost"
                )
                share[str(kind), way] += math.exp(-level / 32)
            at += kept
    total = sum(share.values()) + rest
    found = {row["category"]: row for row in ask(targets, "FROM coverage_by_category", capture)}
    for row in found.values():
        for way in ("exact", "pieces", "moved", "lost"):
            assert row[way] == pytest.approx(share[row["category"], way] / total, abs=1e-9)
    assert found["not kept"]["rest"] == pytest.approx(rest / total)
    assert sum(row["mass"] for row in found.values()) == pytest.approx(1)
    assert {kind for kind, _ in share} <= set(found)


def test_entries_of_each_loss_sum_to_one(targets: Path, same_targets: Path) -> None:
    for root, view in ((targets, "pkl_entries"), (same_targets, "skl_entries")):
        query = f"""
            SELECT max(abs(mass - 1)) AS off FROM (
                SELECT sum(probability) + any_value(rest) AS mass FROM {view} GROUP BY sample_id, chunk
            )
        """
        assert ask(root, query)[0]["off"] < 1e-5
    query = """
        SELECT max(abs(mass - 1)) AS off FROM (
            SELECT sum(probability) + any_value(rest) AS mass FROM prefix_entries
            JOIN (SELECT sample_id, student_start AS pos FROM chunks) USING (sample_id, pos) GROUP BY sample_id, pos
        )
    """
    assert ask(targets, query)[0]["off"] < 1e-5


@pytest.mark.parametrize(
    ("view", "axis", "count", "column"),
    [
        ("pkl_entries", "chunk", "pkl_count", "pkl_logprob"),
        ("uld_entries", "chunk", "uld_count", "uld_logprob"),
        ("prefix_entries", "pos", "prefix_count", "prefix_logprob"),
        ("child_entries", "pos", "child_count", "child_logprob"),
        ("hkl_entries WHERE common", "chunk", "hkl_common_count", "hkl_common_logprob"),
        ("hkl_entries WHERE NOT common", "chunk", "hkl_other_count", "hkl_other_logprob"),
        ("gold_entries WHERE matched", "chunk", "gold_count", "gold_logprob"),
        ("gold_entries WHERE NOT matched", "chunk", "gold_other_count", "gold_other_logprob"),
    ],
)
def test_entries_stand_at_their_place(targets: Path, view: str, axis: str, count: str, column: str) -> None:
    expected = []
    for sample in stored(targets):
        places = [(place, rank) for place, n in enumerate(sample[count]) for rank in range(n)]
        expected += [(sample["sample_id"], *at, value) for at, value in zip(places, sample[column], strict=True)]
    rank = "number" if view == "child_entries" else "rank"
    found = ask(targets, f"SELECT sample_id, {axis} AS place, {rank} AS rank, logprob FROM {view} LIMIT 5000")
    rows = [(row["sample_id"], row["place"], row["rank"], row["logprob"]) for row in found]
    assert rows == expected[:5000]
    select = f"SELECT count(*) AS n FROM {view}"
    assert ask(targets, select) == [{"n": len(expected)}]


def test_chunk_tokens_are_the_same_text_on_both_sides(capture: Path, targets: Path) -> None:
    query = """
        SELECT sample_id, chunk,
            string_agg(hex(bytes), '' ORDER BY pos) FILTER (WHERE side = 'student') AS student,
            string_agg(hex(bytes), '' ORDER BY pos) FILTER (WHERE side = 'teacher') AS teacher
        FROM chunk_tokens WHERE chunk > 1 GROUP BY ALL HAVING student <> teacher
    """
    assert ask(targets, query, capture) == []
    both = ask(targets, "SELECT count(*) AS n FROM chunk_tokens WHERE side = 'teacher'", capture)
    assert both == ask(targets, "SELECT sum(teacher_tokens)::BIGINT AS n FROM samples")


def test_what_targets_do_not_hold_is_refused_by_name(same_targets: Path, targets: Path) -> None:
    with pytest.raises(XtokenError, match=r"pkl_ids, pkl_logprob.*--for sparse-kl,p-kl"):
        ask(same_targets, "FROM pkl_entries")
    with pytest.raises(XtokenError, match=r"uld_entries is not here: it reads the columns of loss uld \(uld_count"):
        ask(same_targets, "SELECT * FROM uld_entries")
    with pytest.raises(XtokenError, match=r"coverage_by_category is not here.*name it with --capture"):
        ask(targets, "FROM coverage_by_category")
