"""Every sample that has no targets has a line with its place and the rule that it breaks; so has every bad document."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess

from xtoken.pipeline.align.encoding import Refusal, encode_one
from xtoken.pipeline.align.multi_capture import run_captures
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.seal import SUMS_FILE, read_sums, sums_text
from xtoken.pipeline.store.skip_records import count_reasons
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.tokens import Encoded, load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.share import PullConfig
from xtoken.schemas.errors import IncompleteRun, VerificationError
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.usefixtures("one_worker_is_here")

NOT_REJOINED = "the tokens do not rejoin the text"
LINES = [
    {"id": "book/en/one", "text": "plain words\n" * 20},
    {"id": "book/en/two", "text": "\u00a4 strange \u00a4"},
    {"id": "book/de/one", "text": "more plain words\n" * 20},
    {"id": "odd", "text": "\u00a4 stranger \u00a4"},
    {"id": "blank", "text": "  "},
    {"id": "number", "text": 3},
]


@pytest.fixture(scope="module")
def deaf(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2's tokenizer, but it drops a character: a text that begins and ends with it cannot be placed."""
    data = json.loads(tokenizer_file("smollm2").read_text(encoding="utf-8"))
    dropped = {"type": "Split", "pattern": {"String": "\u00a4"}, "behavior": "Removed", "invert": False}
    data["pre_tokenizer"]["pretokenizers"].insert(0, dropped)
    path = tmp_path_factory.mktemp("deaf") / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def captured(root: Path, teacher: Path, **more: Any) -> str:
    """A capture of ``LINES`` whose bad documents are skipped."""
    (root / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    config = PrecomputeConfig.from_flat(
        corpus=str(root / "corpus.jsonl"),
        id_field="id",
        teacher=str(teacher),
        out=str(root / "capture"),
        backend="fake",
        shard_bytes=100,
        k=8,
        on_bad="skip",
        **more,
    )
    precompute(config, Silent(), executor=InProcess())
    return config.out


@pytest.fixture(scope="module")
def capture(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Read only."""
    return captured(tmp_path_factory.mktemp("skips"), tokenizer_file("smollm2"))


def aligned(capture: str, student: str, out: Path, **more: Any) -> dict[str, Any]:
    config = AlignConfig(captures=[capture], student=student, out=str(out), on_bad="set-aside", **more)
    return run_captures(config, Silent())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def targets(capture: str, deaf: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets that lack two samples, by two workers; read only."""
    out = tmp_path_factory.mktemp("skips") / "targets"
    figures = aligned(capture, deaf, out, workers=2)
    assert figures["samples_skipped"] == 2
    assert figures["skipped_by_reason"] == {NOT_REJOINED: 2}
    return out


def test_each_skipped_sample_has_a_place_and_a_reason(targets: Path) -> None:
    found = lines(targets / "skipped.jsonl")
    places = [(line["sample_id"], line["document"], line["source"]) for line in found]
    assert places == [("book/en/two#0", "book/en/two", "book/en"), ("odd#0", "odd", "odd")]
    assert all(line["reason"] == NOT_REJOINED and "at byte 0 the tokens have" in line["detail"] for line in found)
    assert inspect(str(targets))["skipped_samples"] == {NOT_REJOINED: 2}


def test_a_run_that_is_refused_names_the_reasons(capture: str, deaf: str, targets: Path, tmp_path: Path) -> None:
    """And writes the same bytes, whatever the number of workers."""
    config = AlignConfig(captures=[capture], student=deaf, out=str(tmp_path / "out"))
    with pytest.raises(IncompleteRun, match=rf"2 samples: {NOT_REJOINED}"):
        run_captures(config, Silent())
    assert (tmp_path / "out" / "skipped.jsonl").read_bytes() == (targets / "skipped.jsonl").read_bytes()


def test_a_capture_without_text_gives_the_same(
    deaf: str, targets: Path, tokenizer_file: Callable[[str], Path], tmp_path: Path
) -> None:
    silent = captured(tmp_path, tokenizer_file("smollm2"), text=False)
    aligned(silent, deaf, tmp_path / "out", corpus=str(tmp_path / "corpus.jsonl"))
    assert (tmp_path / "out" / "skipped.jsonl").read_bytes() == (targets / "skipped.jsonl").read_bytes()


def test_it_is_vouched_for_and_travels(targets: Path, tmp_path: Path) -> None:
    verify(str(targets))
    assert "skipped.jsonl" in read_sums(Folder(str(targets)))
    pull(PullConfig(source=str(targets), destination=str(tmp_path / "there")), Silent())
    assert (tmp_path / "there" / "skipped.jsonl").read_bytes() == (targets / "skipped.jsonl").read_bytes()
    assert verify(str(tmp_path / "there"))["samples"] == 2
    (tmp_path / "there" / "skipped.jsonl").write_text("{}\n")
    with pytest.raises(VerificationError, match=r"skipped.jsonl: sha256"):
        verify(str(tmp_path / "there"))


def test_targets_of_earlier_releases_stay_valid(targets: Path, tmp_path: Path) -> None:
    """They had the file without reasons, and SHA256SUMS did not name it."""
    old = Path(shutil.copytree(targets, tmp_path / "old"))
    (old / "skipped.jsonl").write_text('{"part": 1, "sample_id": "book/en/two#0"}\n{"part": 3, "sample_id": "odd#0"}\n')
    sums = read_sums(Folder(str(old)))
    del sums["skipped.jsonl"]
    (old / SUMS_FILE).write_bytes(sums_text(sums))
    assert verify(str(old))["samples"] == 2
    assert inspect(str(old))["skipped_samples"] == {"not recorded": 2}


def test_without_skipped_samples_there_is_no_file(capture: str, tmp_path: Path) -> None:
    assert "skipped_by_reason" not in aligned(capture, "bytes", tmp_path / "out")
    assert not (tmp_path / "out" / "skipped.jsonl").exists()
    assert "skipped_samples" not in inspect(str(tmp_path / "out"))


def test_each_bad_document_has_a_place_and_a_reason(capture: str, tmp_path: Path) -> None:
    assert lines(Path(capture) / "bad.jsonl") == [
        {
            "place": "corpus.jsonl, line 5",
            "reason": "empty document",
            "detail": "the document holds nothing but whitespace",
            "outcome": "skipped",
        },
        {
            "place": "corpus.jsonl, line 6",
            "reason": "field is not text",
            "detail": "field 'text' holds number, not text",
            "outcome": "skipped",
        },
    ]
    assert inspect(capture)["bad_documents"] == {"empty document": 1, "field is not text": 1}
    assert "bad.jsonl" in read_sums(Folder(capture))
    pull(PullConfig(source=capture, destination=str(tmp_path / "there")), Silent())
    assert (tmp_path / "there" / "bad.jsonl").read_bytes() == (Path(capture) / "bad.jsonl").read_bytes()
    verify(str(tmp_path / "there"))


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "skipped.jsonl").write_text('{"reason": "x"}\n{"rea')
    with pytest.raises(VerificationError, match=r"skipped.jsonl, line 2: expected a JSON object"):
        count_reasons(Folder(str(tmp_path)), "skipped.jsonl")
    assert count_reasons(Folder(str(tmp_path)), "bad.jsonl") == {}


def test_reasons(deaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(deaf)
    assert encode_one(tokenizer, "plain", True)[1] is None
    whole, refusal = encode_one(tokenizer, "\u00a4 a \u00a4", True)
    assert whole is None
    assert refusal is not None
    assert refusal.reason == NOT_REJOINED

    def other(text: str, *, complete: bool, keep_text: bool) -> Encoded:
        return load_tokenizer("bytes").encode("other", complete=False)

    monkeypatch.setattr(tokenizer, "encode", other)
    assert encode_one(tokenizer, "plain", True) == (
        None,
        Refusal("the tokens stand for another text", "the tokenizer rewrote it and keeps no byte ends of it"),
    )
