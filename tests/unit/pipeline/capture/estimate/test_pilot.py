"""What --dry-run --pilot says, against the capture that the same flags then write."""

import json
import random
import tempfile
from pathlib import Path

import pytest
from in_process import InProcess
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.capture.estimate.sampling import PIECE, evenly, ratio, take_pool
from xtoken.schemas.configs.capture import CorpusConfig, PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

PROSE = Path(__file__).parents[5] / "examples" / "data" / "moby-dick.jsonl"


def write_corpus(path, documents, size):
    """Documents of about ``size`` characters of prose: rows of a fake teacher repeat where its text does."""
    text = "\n".join(json.loads(line)["text"] for line in PROSE.read_text().splitlines())
    source = random.Random(3)
    with path.open("w") as file:
        for _ in range(documents):
            length = source.randint(size // 2, 2 * size)
            file.write(json.dumps({"text": text[:length]}) + "\n")
            text = text[length:]
            assert text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("estimate")


@pytest.fixture(scope="module")
def all_flags(folder, tokenizer_file):
    write_corpus(folder / "corpus.jsonl", 100, 500)
    return {
        "corpus": str(folder / "corpus.jsonl"),
        "teacher": str(tokenizer_file("smollm2")),
        "backend": "fake",
        "k": 16,
        "max_tokens": 128,
        "shard_bytes": 1 << 15,
    }


@pytest.fixture
def flags(all_flags):
    return dict(all_flags)


def estimate(flags, **changes):
    """Without --out: of the whole corpus."""
    return dry_run(PrecomputeConfig.from_flat(**{**flags, **changes}, dry_run=True, pilot=True), Silent())


@pytest.fixture(scope="module")
def capture(all_flags, folder):
    """The capture of the whole corpus."""
    config = PrecomputeConfig.from_flat(**all_flags, out=str(folder / "out"))
    return precompute(config, Silent(), executor=InProcess())


def totals(manifest, *names):
    return tuple(sum(getattr(part, name) for part in manifest.parts) for name in names)


def test_a_pilot_foretells_what_precompute_writes(flags, capture, folder):
    found = estimate(flags, pilot_tokens=4000)
    tokens, rows, entries, file_bytes = totals(capture, "tokens", "rows", "entries", "file_bytes")
    assert found["documents"] == 100
    assert found["tokens"] == found["tokens_low"] == found["tokens_high"] == tokens, "all of it was tokenized"
    assert 3000 < found["pilot_tokens"] < 6000 < tokens
    assert found["bytes_per_token"]["all"] == pytest.approx(file_bytes / tokens, rel=0.1)
    assert found["entries_per_row"] == pytest.approx(entries / rows, rel=0.05)
    assert found["disk_bytes_low"] < found["disk_bytes"] < found["disk_bytes_high"]
    vocab = sum((folder / "out" / name).stat().st_size for name in ("vocab.parquet", "merges.parquet"))
    assert found["vocabulary_bytes"] == vocab
    assert found["disk_bytes"] == pytest.approx(file_bytes + vocab, rel=0.1)
    assert not found["whole_corpus_scored"]


def test_a_pilot_of_all_leaves_no_doubt(flags, capture):
    found = estimate(flags, pilot_tokens=10**6)
    tokens, rows, entries, file_bytes = totals(capture, "tokens", "rows", "entries", "file_bytes")
    assert found["whole_corpus_scored"]
    assert found["pilot_tokens"] == found["tokens"] == tokens
    assert found["entries_per_row"] == entries / rows
    assert found["disk_bytes_low"] == found["disk_bytes"] == found["disk_bytes_high"]
    assert found["bytes_per_token"]["all"] == pytest.approx(file_bytes / tokens, rel=0.03)


def test_a_corpus_larger_than_the_pool_is_extrapolated(flags, capture, monkeypatch):
    monkeypatch.setattr("xtoken.pipeline.capture.estimate.sampling.PIECE", 1024)
    monkeypatch.setattr("xtoken.pipeline.capture.estimate.pilot.POOL", 16 * 1024)
    monkeypatch.setattr("xtoken.pipeline.capture.estimate.pilot._WIDEST", 1)
    found = estimate(flags, pilot_tokens=2000)
    tokens, text_bytes = totals(capture, "tokens", "text_bytes")
    assert found["text_bytes"] == text_bytes
    assert found["tokens"] == pytest.approx(tokens, rel=0.05)
    assert found["tokens_low"] < found["tokens"] < found["tokens_high"]
    assert found["tokens_low"] < tokens < found["tokens_high"]


def test_the_same_pilot_every_time_and_nothing_left(flags, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    first, second = (estimate(flags, pilot_tokens=500) for _ in range(2))
    timed = {"rows_per_s", "rows_per_s_of_one", "start_up_s", "hours", "time"}
    assert {name: first[name] for name in first.keys() - timed} == {
        name: second[name] for name in second.keys() - timed
    }
    assert list(scratch.iterdir()) == []


def test_draws(flags):
    of_both = {name: value for name, value in flags.items() if name not in ("k", "min_p")}
    found = estimate(of_both, pilot_tokens=500, codec="sampled", draws=20)
    assert found["draws"] == 20
    assert 1 < found["distinct_ids_per_row"] < 20
    assert "draw_codes" in found["bytes_per_token"]
    assert "mass_not_kept_mean" not in found


def test_hours_follow_from_the_rate_and_the_workers(flags):
    found = estimate(flags, pilot_tokens=500, workers=4)
    assert found["workers_that_add_speed"] == 4
    # no more of them than shards
    seconds = found["start_up_s"] + found["tokens"] / found["rows_per_s"] / min(4, found["shards"])
    assert found["hours"] == pytest.approx(seconds / 3600, abs=1e-4)


def test_like_a_capture_needs_no_teacher(flags, capture, folder, tmp_path):
    tokens, text_bytes, file_bytes = totals(capture, "tokens", "text_bytes", "file_bytes")
    write_corpus(tmp_path / "other.jsonl", 20, 300)
    asked = {**flags, "corpus": str(tmp_path / "other.jsonl"), "teacher": "nobody/there"}
    found = estimate(asked, like=str(folder / "out"))
    assert found["tokens"] == round(found["text_bytes"] * tokens / text_bytes)
    assert found["disk_bytes"] == pytest.approx(found["tokens"] * file_bytes / tokens, abs=file_bytes / tokens)
    assert found["tokens_low"] < found["tokens"] < found["tokens_high"]
    assert "unknown" in found["hours"]
    assert "k 16, min_p 0.003" in found["settings"]


@pytest.mark.usefixtures("vllm_gives_the_top_k")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 200, "teacher": "bytes", "max_tokens": 8, "corpus": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"like": "nowhere"}, "not a finished artifact"),
        ({"temperatures": [2.0], "backend": "vllm"}, "needs whole teacher rows"),
    ],
)
def test_refusals(flags, changes, said):
    with pytest.raises(XtokenError, match=said):
        estimate(flags, **changes)


def test_an_empty_corpus_is_refused(flags, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    flags["corpus"] = str(tmp_path / "empty.jsonl")
    with pytest.raises(XtokenError, match="has no usable document"):
        estimate(flags)


def test_one_window_tells_no_spread(flags):
    found = estimate(flags, pilot_tokens=1)
    assert found["pilot_windows"] == 1
    assert found["disk_bytes_low"] is None
    assert found["disk_bytes_high"] is None


def test_the_command_line(flags):
    words = [flags["corpus"], "--teacher", flags["teacher"], "--backend", "fake", "--k", "16", "--pilot-tokens", "300"]
    result = CliRunner().invoke(cli.app, ["precompute", *words, "--dry-run", "--pilot", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert figures["documents"] == 100
    assert figures["disk_bytes"] > figures["vocabulary_bytes"] > 0
    assert (figures["log"], "disk_bytes_free" in figures) == ("none", False)
    old = CliRunner().invoke(cli.app, ["estimate", *words, "--json"])
    assert old.exit_code == 0, old.output
    assert json.loads(old.stdout).keys() == figures.keys()
    same = f"xtoken precompute {flags['corpus']} --teacher {flags['teacher']} --backend fake --k 16 --dry-run --pilot"
    assert old.stderr == f"note: 'xtoken estimate' will be gone in 0.7.0; the same is: {same} --pilot-tokens 300\n"


def test_of_a_run_that_is_half_done_the_intervals_are_of_all(flags, capture, folder):
    found = estimate(flags, pilot_tokens=500, out=str(folder / "out"))
    assert (found["plan"], found["shards_left"]) == ("there", 0)
    assert found["tokens_low"] == found["tokens"] == found["tokens_high"]
    like = estimate(flags, like=str(folder / "out"), out=str(folder / "out"))
    assert (like["disk_bytes_left"], like["shards_left"]) == (0, 0)


def test_pieces_come_from_all_over_the_corpus(tmp_path):
    text = "".join(f"word{number} " for number in range(40_000))
    lines = [text, *("small one " * 50 for _ in range(300)), text]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = CorpusConfig(corpus=str(tmp_path / "corpus.jsonl"))
    pool = take_pool(config, 1 << 16, 4 * PIECE, Silent())
    total = sum(len(line) for line in lines)
    assert (pool.documents, pool.text_bytes, pool.whole) == (302, total, False)
    assert pool.shards == 4
    assert 4 <= len(pool.pieces) <= 9
    assert {piece.record for piece in pool.pieces} >= {0, 301}
    assert any(1 <= piece.record <= 300 and piece.text == "small one " * 50 for piece in pool.pieces)
    assert all(len(piece.text.encode()) <= PIECE for piece in pool.pieces)
    whole = take_pool(config, 1 << 16, total, Silent())
    assert whole.whole
    assert [piece.text for piece in whole.pieces] == lines


def test_evenly_and_ratio():
    assert evenly(range(10), 2) == [2, 7]
    assert evenly(range(3), 9) == [0, 1, 2]
    assert evenly(range(3), 0) == [1]
    exact = ratio([2, 4], [1, 2], 0.0)
    assert (exact.value, exact.error) == (2.0, 0.0)
    part, all_seen = ratio([1, 3], [1, 1], 0.0), ratio([1, 3], [1, 1], 1.0)
    # the textbook standard error of the mean of 1 and 3 is 1, half of the mean; t of one degree of freedom is 12.71
    assert part.value == 2.0
    assert part.error == pytest.approx(12.71 * 0.5)
    assert ratio([1, 3] * 50, [1] * 100, 0.0).error == pytest.approx(2 * 0.5 / 99**0.5)
    assert (all_seen.value, all_seen.error) == (2.0, 0.0)
