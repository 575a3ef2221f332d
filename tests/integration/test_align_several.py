"""Several captures in one align: a folder each, what they share, and a failure that costs the others nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets

LONG = "a longer document, which small windows cut: " * 20


@pytest.fixture(scope="module")
def captures(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Captures by two tokenizers: short documents join, a long one is cut elsewhere by each."""
    root = tmp_path_factory.mktemp("captures")
    texts = [f"document {number}: some words, 1234, größer\n" * 2 for number in range(8)]
    lines = [json.dumps({"id": f"d{number}", "text": text}) for number, text in enumerate([*texts, LONG])]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    for name, teacher in (("smol", str(tokenizer_file("smollm2").parent)), ("raw", "bytes")):
        flags: dict[str, Any] = {"backend": "fake", "k": 4, "max_tokens": 128, "shard_bytes": 300}
        corpus, out = str(root / "corpus.jsonl"), str(root / name)
        precompute(
            PrecomputeConfig.from_flat(corpus=corpus, id_field="id", teacher=teacher, out=out, **flags), Silent()
        )
    return {"smol": root / "smol", "raw": root / "raw"}


def call(*words: object) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli.app, ["align", *map(str, words), "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def test_a_folder_each_and_what_they_have_in_common(captures: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "t"
    words = [",".join(map(str, captures.values())), "--student", "bytes", "--out", out, "--for", "alm"]
    code, figures = call(*words)
    assert code == 0, figures
    assert [(row["capture"], row["outcome"]) for row in figures["captures"]] == [
        (str(root), "done") for root in captures.values()
    ]
    assert figures["join"]["in_all"] == 8
    assert figures["join"]["examples"]["other_bytes"] == ["d8#0", "d8#1"]
    assert json.loads((out / "join.json").read_text())["captures"][str(captures["raw"])]["max_tokens"] == 128
    for name in captures:
        verify(str(out / name))
    joined = Sources([Targets(str(out / name)) for name in captures])
    assert joined.shared == figures["join"]["in_all"], "training joins what was said to join"
    assert call(*words)[0] == 0


def test_a_capture_that_fails_costs_the_others_nothing(captures: dict[str, Path], tmp_path: Path) -> None:
    broken, out = tmp_path / "raw", tmp_path / "t"
    shutil.copytree(captures["raw"], broken)
    (broken / "data" / "part-00000.parquet").unlink()
    words = [f"{broken},{captures['smol']}", "--student", "bytes", "--out", out, "--for", "alm"]
    code, said = call(*words)
    assert (code, said["kind"]) == (4, "PartlyDone")
    assert "part 0" in said["error"]
    rows = {Path(row["capture"]).name: row for row in said["captures"]}
    assert (rows["raw"]["outcome"], rows["smol"]["outcome"]) == ("failed", "done")
    assert rows["raw"]["parts_unread"] == [0]
    code, said = call(*words, "--on-bad", "set-aside")
    assert code == 4
    rows = {Path(row["capture"]).name: row for row in said["captures"]}
    assert (rows["raw"]["outcome"], rows["smol"]["outcome"]) == ("partly", "done")
    assert list(rows["raw"]["set_aside"]) == ["part 0"]
    shutil.copy(captures["raw"] / "data" / "part-00000.parquet", broken / "data" / "part-00000.parquet")
    assert call(*words)[0] == 0
    verify(str(out / "raw"))


def test_refusals_come_before_any_work(captures: dict[str, Path], tmp_path: Path) -> None:
    out, both = tmp_path / "t", ",".join(map(str, captures.values()))
    code, said = call(both, "--student", "bytes", "--out", out, "--for", "sparse-kl")
    assert (code, "the student's tokenizer bytes" in said["error"]) == (2, True)
    code, said = call(f"{captures['raw']},{tmp_path / 'nothing'}", "--student", "bytes", "--out", out)
    assert (code, "does not exist" in said["error"]) == (2, True)
    code, said = call(",", "--student", "bytes", "--out", out)
    assert (code, "an empty path" in said["error"]) == (2, True)
    assert not out.exists()
