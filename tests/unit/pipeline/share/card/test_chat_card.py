"""The card of conversations: figures against loops over the spans, and recipes that find the token of each row."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from xtoken.pipeline.share.card.alignment import alignments
from xtoken.pipeline.share.card.card import card_files
from xtoken.pipeline.share.card.stats import read_stats
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_capture, load_vocab
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.spans import tokens_with_row
from xtoken.schemas.ui.progress import Silent

from ...store.damage import damaged

LICENSES = {"corpus": "cc-by-4.0", "outputs": "gemma"}
_BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def manifest_of(root: Path) -> CaptureManifest:
    return read_manifest(str(root), CaptureManifest)


def readme(root: Path) -> str:
    return card_files(str(root), manifest_of(root), LICENSES, None)["README.md"].decode()


def samples_of(root: Path) -> list[dict[str, Any]]:
    return [sample for batch in iter_capture(str(root)) for sample in batch.to_pylist()]


def taught(root: Path) -> Counter[str]:
    """Tokens of the spans that are taught, by kind."""
    found: Counter[str] = Counter()
    for sample in samples_of(root):
        sizes = np.diff(sample["span_token_end"], prepend=0).tolist()
        for kind, learn, size in zip(sample["span_kind"], sample["span_learn"], sizes, strict=True):
            found[kind] += size if learn else 0
    return +found


def test_figures_are_those_of_the_spans(chat_capture: Path) -> None:
    found, samples, by_kind = inspect(str(chat_capture))["chat"], samples_of(chat_capture), taught(chat_capture)
    assert set(by_kind) == {"assistant", "thinking", "marker", "call", "stop"}
    assert found["taught_tokens"] == by_kind
    answers = [{m for m, learn in zip(one["span_message"], one["span_learn"], strict=True) if learn} for one in samples]
    assert found["taught_turns"] == sum(map(len, answers))
    tokens = sum(len(sample["teacher_ids"]) for sample in samples)
    assert found["share_of_tokens_taught"] == pytest.approx(by_kind.total() / tokens, abs=1e-4)
    assert (found["form"], found["turns"], found["long"]) == ("messages", "all", "cut")
    assert found["learn"] == "assistant,call,stop,thinking"
    assert found["absent_contents"] == {"thinking": 2}
    assert verify(str(chat_capture))["chat"] == found


def test_inspect_shows_a_row_at_the_token_it_predicts(chat_capture: Path) -> None:
    found = inspect(str(chat_capture))
    assert "chat" not in found["provenance"] or found["provenance"]["chat"]["form"] == "messages"
    for shown, batch in zip(found["samples_shown"], iter_capture(str(chat_capture)), strict=False):
        one = batch.slice(0, 1)
        if shown["sample_id"] == one["sample_id"][0].as_py():
            places = np.flatnonzero(tokens_with_row(one))
            assert shown["row"]["position"] == places[len(places) // 2]
            assert any(word.endswith(", taught") for word in shown["spans"])


def test_plain_text_has_no_such_figures(kept_capture: Path) -> None:
    assert "chat" not in inspect(str(kept_capture))
    assert "chat" not in verify(str(kept_capture))
    assert "conversation" not in readme(kept_capture).lower()


def test_what_the_card_says(chat_capture: Path) -> None:
    text, by_kind, chat = readme(chat_capture), taught(chat_capture), manifest_of(chat_capture).chat
    assert chat is not None
    for words in (
        "expected at every taught token of conversations",
        "read from the form `messages`",
        "taught is every answer, of it assistant, call, stop, thinking",
        f"sha256 `{chat.template}`",
        f"for the date `{chat.date}`",
        f"| rows, one for each taught token | {by_kind.total()} |",
        *(f"| of them {kind} | {count} |" for kind, count in by_kind.items()),
        "What the chat template leaves out, or writes otherwise: thinking: 2.",
        "Not measured: a student's own chat template decides",
    ):
        assert words in text


def test_skipped_conversations_are_counted_by_reason(chat_capture: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(chat_capture, tmp_path / "capture"))
    lines = ['{"part": 0, "sample_id": "x#0", "reason": "nothing is taught", "detail": ""}\n'] * 3
    (root / "skipped.jsonl").write_text("".join(lines))
    assert inspect(str(root))["skipped_conversations"]["nothing is taught"] == 3
    assert "Conversations left out: nothing is taught: 3" in readme(root)


def test_stats_are_of_taught_tokens(chat_capture: Path) -> None:
    stats, nats, size, rows = read_stats(str(chat_capture), manifest_of(chat_capture), Silent()), 0.0, 0, 0
    for sample in samples_of(chat_capture):
        ends = [0, *sample["teacher_end"]]
        first = 0
        for stop, learn in zip(sample["span_token_end"], sample["span_learn"], strict=True):
            size += ends[stop] - ends[first] if learn else 0
            rows += stop - first if learn else 0
            first = stop
        nats -= sum(sample["realised_logprob"])
    assert (stats.rows, stats.text_bytes) == (rows, size)
    assert stats.bits_per_byte == pytest.approx(nats / np.log(2) / size)


def entries_of(root: Path, name: str) -> list[tuple[int, int, float]]:
    """Position, id and log-probability of each of a sample's entries, by our own decoder."""
    codec = open_codec(manifest_of(root).codec)
    for batch in iter_capture(str(root)):
        for at in range(batch.num_rows):
            one = batch.slice(at, 1)
            if one["sample_id"][0].as_py() == name:
                rows, places = codec.decode(one), np.flatnonzero(tokens_with_row(one))
                position = np.repeat(places, np.diff(rows.offsets))
                return list(zip(position.tolist(), rows.ids.tolist(), rows.logprob.tolist(), strict=True))
    raise AssertionError(name)


def test_recipes_find_the_token_of_each_row(chat_capture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chat_capture)
    blocks: dict[str, list[str]] = {}
    for language, code in _BLOCK.findall(readme(chat_capture)):
        blocks.setdefault(language, []).append(code)
    samples = samples_of(chat_capture)
    surprising, decoded = blocks["sql"]
    bits = {s["sample_id"]: -sum(s["realised_logprob"]) / np.log(2) / len(s["realised_logprob"]) for s in samples}
    assert dict(duckdb.connect().sql(surprising).fetchall()) == pytest.approx(bits)
    found = duckdb.connect().sql(decoded.replace("LIMIT 20", "")).fetchall()
    ours = entries_of(chat_capture, min(bits))
    assert [(row[0], row[2]) for row in found] == [entry[:2] for entry in ours]
    assert [row[4] for row in found] == pytest.approx([entry[2] for entry in ours])
    reading, decoding = [code for code in blocks["python"] if "pl." not in code and "datasets" not in code]
    names: dict[str, Any] = {}
    exec(reading, names)  # the card's own code
    exec(decoding, names)
    best = names["best"]
    assert list(zip(best["position"], best["token_id"], strict=True)) == [
        entry[:2] for entry in entries_of(chat_capture, names["sample"]["sample_id"])
    ]
    exec(next(code for code in blocks["python"] if "pl." in code), names)
    table = names["samples"].collect()
    assert dict(zip(table["sample_id"], table["bits_per_token"], strict=True)) == pytest.approx(bits, rel=1e-4)
    assert load_vocab(".").size == len(names["vocab"])


def test_students_of_a_card_are_for_plain_text(chat_capture: Path) -> None:
    with pytest.raises(XtokenError, match=r"--students bytes counts chunks of plain text.*'xtoken align' counts them"):
        alignments(str(chat_capture), manifest_of(chat_capture), ["bytes"])


@pytest.mark.parametrize("column", ["span_token_end", "span_learn"])
def test_damaged_spans_are_named(chat_capture: Path, tmp_path: Path, column: str) -> None:
    for root in damaged(chat_capture, column, tmp_path):
        with pytest.raises(VerificationError, match=r"part-0000\d\.parquet breaks a rule of the format"):
            readme(root)
