"""Views of a capture against slow loops over the files themselves."""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from xtoken.schemas.categories import category

from .conftest import TEXTS, ask


def stored(root: Path) -> list[dict[str, Any]]:
    """Samples as they lie on disk."""
    return [row for path in sorted((root / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def vocab(root: Path) -> dict[int, dict[str, Any]]:
    return {row["token_id"]: row for row in pq.read_table(root / "vocab.parquet").to_pylist()}


def slow_entries(root: Path) -> list[tuple[str, int, int, int, float]]:
    """Sample, position, rank, id, probability of every entry."""
    id_of_code = {row["code"]: token for token, row in vocab(root).items()}
    found = []
    for sample in stored(root):
        at = 0
        for row, kept in enumerate(sample["kept"]):
            level = 0
            for rank in range(kept):
                level += sample["topk_gap"][at]
                token = id_of_code[sample["topk_codes"][at]]
                found.append((sample["sample_id"], row + sample["first_row"], rank, token, math.exp(-level / 32)))
                at += 1
    return found


def test_samples(capture: Path) -> None:
    found = {row["sample_id"]: row for row in ask(capture, "FROM samples")}
    assert set(found) == {row["sample_id"] for row in stored(capture)}
    for sample in stored(capture):
        row = found[sample["sample_id"]]
        size, nats = len(sample["text"].encode()), -sum(sample["realised_logprob"])
        assert (row["text"], row["bytes"], row["tokens"]) == (sample["text"], size, len(sample["teacher_ids"]))
        assert row["entries"] == sum(sample["kept"])
        assert row["nats"] == pytest.approx(nats, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert f"{row['document']}#{row['window_number']}" == sample["sample_id"]
        assert (row["first_row"], row["complete"], row["snapped"]) == (
            sample["first_row"],
            sample["complete"],
            sample["snapped"],
        )


def test_source_and_script_group_documents(capture: Path) -> None:
    rows = ask(capture, "SELECT DISTINCT source, script FROM samples")
    assert {(row["source"], row["script"]) for row in rows} == {
        ("book/en", "Latin"),
        ("book/ja", "Kana"),
        ("book/zh", "Han"),
        ("book/ru", "Cyrillic"),
        ("code", "Latin"),
        ("plain", "other"),
    }
    assert {row["document"] for row in ask(capture, "FROM samples")} == set(TEXTS)


@pytest.mark.parametrize(
    ("sample_id", "source"),
    [
        ("handbook/de-DE/sect.x#12", "handbook/de-DE"),
        ("corpus.jsonl:12#0", "corpus.jsonl"),
        ("folder/corpus.jsonl:12#0", "folder"),
        ("a.txt:0#3", "a.txt"),
        ("17#0", "17"),
        ("chats.jsonl:4#2.0", "chats.jsonl"),
        ("talk#12.7", "talk"),
        ("v1.5#0", "v1.5"),
        ("a#b#0", "a"),
        ("odd\nname/x#0", "odd\nname"),
    ],
)
def test_where_a_source_ends(capture: Path, sample_id: str, source: str) -> None:
    shown = sample_id.replace("'", "''")
    assert ask(capture, f"SELECT source_of('{shown}') AS found") == [{"found": source}]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("naïve café 2024", "Latin"),
        ("Ελληνικά", "Greek"),
        ("العربية", "Arabic"),
        ("עברית", "Hebrew"),
        ("हिन्दी भाषा", "Devanagari"),
        ("한국어", "Hangul"),
        ("ภาษาไทย", "Thai"),
        ("中文和汉字 API", "Han"),
        ("東京特許許可局", "Han"),
        ("東京へ行く", "Kana"),
        ("1 + 2 = 3", "other"),
        ("", "other"),
    ],
)
def test_scripts(capture: Path, text: str, script: str) -> None:
    assert ask(capture, f"SELECT script_of('{text}') AS found") == [{"found": script}]


def test_tokens(capture: Path) -> None:
    known = vocab(capture)
    found = ask(capture, "FROM tokens")
    at = 0
    for sample in stored(capture):
        first, start = sample["first_row"], 0
        for pos, token in enumerate(sample["teacher_ids"]):
            row, r = found[at], pos - first
            at += 1
            assert (row["sample_id"], row["pos"], row["teacher_id"]) == (sample["sample_id"], pos, token)
            assert row["token"] == known[token]["bytes"].decode("utf-8", "backslashreplace")
            assert (row["start_byte"], row["end_byte"]) == (start, sample["teacher_end"][pos])
            start = row["end_byte"]
            if r < 0:
                assert row["logprob"] is row["kept"] is row["rest"] is row["surprise"] is None
                continue
            assert row["logprob"] == pytest.approx(sample["realised_logprob"][r])
            assert row["surprise"] == pytest.approx(-row["logprob"] / math.log(2))
            gap = sample["rest_gap"][r]
            assert row["kept"] == sample["kept"][r]
            assert row["rest"] == pytest.approx(0.0 if gap == 65535 else math.exp(-gap / 32))
    assert at == len(found)


def test_entries(capture: Path) -> None:
    found = ask(capture, "SELECT * FROM entries LIMIT 5000")
    expected = slow_entries(capture)
    assert ask(capture, "SELECT count(*) AS n FROM entries") == [{"n": len(expected)}]
    known = vocab(capture)
    for row, (sample_id, pos, rank, token, probability) in zip(found, expected[:5000], strict=True):
        assert (row["sample_id"], row["pos"], row["rank"], row["teacher_id"]) == (sample_id, pos, rank, token)
        assert row["probability"] == pytest.approx(probability)
        assert row["token"] == known[token]["bytes"].decode("utf-8", "backslashreplace")


def test_rows_sum_to_one_with_their_rest(capture: Path) -> None:
    query = """
        SELECT max(abs(mass + rest - 1)) AS off FROM (
            SELECT sample_id, pos, sum(probability) AS mass FROM entries GROUP BY ALL
        ) JOIN tokens USING (sample_id, pos)
    """
    assert ask(capture, query)[0]["off"] < 0.02


def test_mass_adds_up_entries_of_each_token(capture: Path) -> None:
    mass: dict[int, float] = {}
    for _, _, _, token, probability in slow_entries(capture):
        mass[token] = mass.get(token, 0.0) + probability
    rest = sum(0.0 if gap == 65535 else math.exp(-gap / 32) for sample in stored(capture) for gap in sample["rest_gap"])
    total = sum(mass.values()) + rest
    found = {row["teacher_id"]: row for row in ask(capture, "FROM mass WHERE mass > 0")}
    assert set(found) == set(mass)
    for token, row in found.items():
        assert row["mass"] == pytest.approx(mass[token])
        assert row["share"] == pytest.approx(mass[token] / total)
    assert ask(capture, "SELECT count(*) AS n FROM mass") == [{"n": len(vocab(capture))}]


def test_vocab_and_parts(capture: Path) -> None:
    known = vocab(capture)
    for row in ask(capture, "FROM vocab WHERE token_id < 500 OR category = 'partial_utf8'"):
        token = known[row["token_id"]]
        assert (row["code"], row["role"]) == (token["code"], token["role"])
        assert row["category"] == category(token["bytes"], token["role"])
    rows = ask(capture, "SELECT sum(tokens) AS tokens, sum(counts['snapped']) AS snapped FROM parts")
    assert rows == [{"tokens": sum(len(sample["teacher_ids"]) for sample in stored(capture)), "snapped": 0}]
