"""Two teams exchange a capture over a real S3 server: publish, verify, fetch, subset, and train without fetching.

Alpha owns the bucket alpha-store. Beta owns beta-store and may read alpha's. Each command runs in a process that has
one team's keys, and a cache, in its environment.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server

from xtoken import cli
from xtoken.trainer.data.targets import Targets

ROOT = Path(cli.__file__).resolve().parent
TEXT = ROOT / "examples" / "data" / "moby-dick-held-out.jsonl"
DOCUMENTS = 16
SHARED = "s3://alpha-store/captures/smollm2"
TARGETS = "s3://beta-store/targets"


@dataclass(frozen=True)
class Team:
    """Whoever holds a user's keys; with a cache of its own."""

    user: str
    server: S3Server
    cache: Path

    def command(self, *words: object) -> list[str]:
        return [sys.executable, str(ROOT / "cli.py"), *(str(word) for word in words), "--json"]

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return {**kept, **self.server.environment(self.user), "XTOKEN_CACHE": str(self.cache), **more}

    def xtoken(self, *words: object, code: int = 0, **more: str) -> dict[str, Any]:
        """Run a verb to its end; its figures, or the error."""
        done = subprocess.run(
            self.command(*words), env=self.environment(**more), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def cached(self) -> int:
        """Bytes in its cache."""
        return sum(path.stat().st_size for path in self.cache.glob("*")) if self.cache.exists() else 0


@pytest.fixture(scope="module")
def teams(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Team, Team]:
    """Alpha and beta."""
    folder = tmp_path_factory.mktemp("teams")
    alpha, beta = (Team(user, s3_server, folder / user / "cache") for user in ("alpha", "beta"))
    return alpha, beta


@pytest.fixture(scope="module")
def capture(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real capture of SmolLM2-135M over short pieces of prose, a part for each two."""
    from xtoken.pipeline.capture import precompute
    from xtoken.schemas.configs.capture import PrecomputeConfig
    from xtoken.schemas.ui.progress import Silent

    folder = tmp_path_factory.mktemp("alpha")
    text = json.loads(TEXT.read_text(encoding="utf-8"))["text"]
    lines = [json.dumps({"id": f"p{n}", "text": text[200 * n : 200 * (n + 1)].strip()}) for n in range(DOCUMENTS)]
    (folder / "prose.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = PrecomputeConfig.from_flat(
        corpus=str(folder / "prose.jsonl"),
        teacher=str(smollm2_dir),
        out=str(folder / "capture"),
        id_field="id",
        k=16,
        shard_bytes=300,
    )
    assert len(precompute(config, Silent()).parts) >= 6
    return folder / "capture"


@pytest.fixture(scope="module")
def student(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that speaks SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, max_position_embeddings=1024, **sizes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm2_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def shared(teams: tuple[Team, Team], capture: Path) -> str:
    """The capture, published by alpha."""
    licenses = ["--license", "corpus=cc0-1.0,outputs=apache-2.0"]
    teams[0].xtoken("share", "push", capture, SHARED, *licenses)
    return SHARED


@pytest.fixture(scope="module")
def targets(teams: tuple[Team, Team], shared: str, student: Path) -> str:
    """Targets that beta aligned from alpha's bucket straight into its own."""
    teams[1].xtoken("align", shared, "--student", student, "--out", TARGETS, "--workers", 1)
    return TARGETS


def tree(folder: Path, names: Sequence[str] = ("data", "vocab.parquet", "merges.parquet")) -> dict[str, bytes]:
    """Content of the files that rows live in."""
    paths = [
        path for name in names for path in ([folder / name] if (folder / name).is_file() else (folder / name).iterdir())
    ]
    return {path.name: path.read_bytes() for path in sorted(paths)}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


@pytest.mark.engine
def test_the_other_team_verifies_and_inspects_in_place(
    teams: tuple[Team, Team], shared: str, capture: Path, tmp_path: Path
) -> None:
    beta = replace(teams[1], cache=tmp_path / "cache")
    found = beta.xtoken("verify", shared)
    assert found["parts"] == len(list((capture / "data").iterdir()))
    assert found["samples"] == DOCUMENTS
    # no part that verify saw is trusted later, or was trusted then; tables were compared before they were cached
    tables = {hashlib.sha256((capture / name).read_bytes()).hexdigest() for name in ("vocab.parquet", "merges.parquet")}
    assert {path.name for path in beta.cache.iterdir()} - {".lock"} <= tables
    shown = beta.xtoken("inspect", shared)
    assert (shown["kind"], shown["samples"]) == ("capture", DOCUMENTS)
    assert len(shown["samples_shown"]) == 3


@pytest.mark.engine
def test_a_pull_is_the_same_capture_and_a_subset_is_a_true_one(
    teams: tuple[Team, Team], shared: str, capture: Path, tmp_path: Path
) -> None:
    _, beta = teams
    beta.xtoken("share", "pull", shared, tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(capture)
    condition = "len(teacher_ids) % 2 = 0 AND sample_id < 'p7'"
    beta.xtoken("share", "pull", shared, tmp_path / "some", "--where", condition)
    query = f"SELECT sample_id FROM '{capture}/data/*.parquet' WHERE {condition} ORDER BY ALL"
    wanted = [name for (name,) in duckdb.connect().sql(query).fetchall()]
    assert 0 < len(wanted) < DOCUMENTS
    kept = {row["sample_id"]: row for row in rows(capture)}
    found = rows(tmp_path / "some")
    assert sorted(row["sample_id"] for row in found) == wanted
    assert all(row == kept[row["sample_id"]] for row in found)
    beta.xtoken("verify", tmp_path / "some")


@pytest.mark.engine
def test_a_student_trains_from_targets_in_place(
    teams: tuple[Team, Team],
    targets: str,
    capture: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, beta = teams
    beta.xtoken("verify", targets)
    beta.xtoken("align", capture, "--student", student, "--out", tmp_path / "local", "--workers", 1)
    words = ["--student", student, "--steps", 3, "--step-tokens", 128, "--warmup", 0, "--lr", 1e-3]
    here = beta.xtoken("train", tmp_path / "local", *words, "--out", tmp_path / "here")
    there = beta.xtoken("train", targets, *words, "--out", tmp_path / "there")
    assert there["loss"] == here["loss"]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("here", "there")]
    assert weights[0] == weights[1]
    sizes = beta.server.filesystem("beta").du(f"{targets.removeprefix('s3://')}/data", total=False)
    assert sum(sizes.values()) < beta.cached()
    _reads_row_groups_from_the_bucket(beta, targets, tmp_path / "local", monkeypatch)


def _reads_row_groups_from_the_bucket(beta: Team, targets: str, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache cannot hold all parts, each row group comes by itself and nothing is cached."""
    for name, value in (beta.environment() | {"XTOKEN_CACHE_BYTES": "1000", "XTOKEN_CACHE": f"{local}-cache"}).items():
        monkeypatch.setenv(name, value)
    columns = ("student_ids", "chunk_student_end", "pkl_logprob")
    there, here = Targets(targets), Targets(str(local))
    assert (there.stream, here.stream) == (True, False)
    assert there.groups == here.groups
    for ref in here.groups:
        ours, theirs = here.read(ref, columns), there.read(ref, columns)
        assert ours.sample_ids == theirs.sample_ids
        for name in columns:
            assert all((mine == other).all() for mine, other in zip(ours.lists[name], theirs.lists[name], strict=True))
    assert not [path for path in Path(f"{local}-cache").iterdir() if path.name != ".lock"]


@pytest.mark.engine
def test_a_bucket_of_others_is_not_written_to(
    teams: tuple[Team, Team], shared: str, targets: str, student: Path, tmp_path: Path
) -> None:
    _, beta = teams
    for words in (
        ["share", "push", targets, "s3://alpha-store/mine"],
        ["align", shared, "--student", student, "--out", "s3://alpha-store/mine", "--workers", 1],
    ):
        refused = beta.xtoken(*words, code=2)
        assert "s3://alpha-store/mine" in refused["error"]
        assert "Denied" in refused["error"] or "Forbidden" in refused["error"]
        assert "AWS_ACCESS_KEY_ID" in refused["error"]


@pytest.mark.engine
def test_missing_keys_and_servers_are_named(teams: tuple[Team, Team], shared: str, tmp_path: Path) -> None:
    _, beta = teams
    config = {"AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", **config}
    for more, said in (
        (nobody, "credentials"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "signature"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
    ):
        refused = beta.xtoken("inspect", shared, code=2, **more)
        assert said in refused["error"]
        assert shared in refused["error"]
        assert "AWS_ENDPOINT_URL_S3" in refused["error"]
    gone = beta.xtoken("verify", "s3://alpha-store/captures/nothing", code=2)
    assert "s3://alpha-store/captures/nothing" in gone["error"]


@pytest.fixture
def flipped(teams: tuple[Team, Team], shared: str) -> Iterator[str]:
    """A part of the shared capture with one bit changed."""
    fs = teams[0].server.filesystem("alpha")
    path = f"{shared.removeprefix('s3://')}/data/part-00002.parquet"
    whole = fs.cat_file(path)
    middle = len(whole) // 2
    fs.pipe_file(path, whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    yield "part-00002"
    fs.pipe_file(path, whole)


@pytest.mark.engine
def test_a_flipped_bit_is_found_named_and_not_used(
    teams: tuple[Team, Team], shared: str, flipped: str, student: Path, tmp_path: Path
) -> None:
    _, beta = teams
    found = beta.xtoken("verify", shared, code=3)
    assert "part 2" in found["error"]
    pulled = beta.xtoken("share", "pull", shared, tmp_path / "c", code=3)
    assert flipped in pulled["error"]
    assert not (tmp_path / "c" / "manifest.json").exists()
    shutil.rmtree(beta.cache)
    aligned = beta.xtoken("align", shared, "--student", student, "--out", tmp_path / "t", "--workers", 1, code=4)
    assert f"{shared}/data/{flipped}.parquet" in aligned["error"]
    assert not (tmp_path / "t" / "data" / f"{flipped}.parquet").exists()


@pytest.mark.engine
def test_a_pull_that_was_killed_goes_on(teams: tuple[Team, Team], shared: str, capture: Path, tmp_path: Path) -> None:
    _, beta = teams
    words = ("share", "pull", shared, tmp_path / "c", "--workers", 1)
    process = subprocess.Popen(
        beta.command(*words), env=beta.environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + 300
    while not list((tmp_path / "c").glob("commits/*.json")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "c" / "manifest.json").exists()
    done = len(list((tmp_path / "c").glob("commits/*.json")))
    assert 0 < done < len(list((capture / "data").iterdir()))
    resumed = beta.xtoken(*words)
    assert resumed["bytes_kept"] > 0
    assert tree(tmp_path / "c") == tree(capture)
    beta.xtoken("verify", tmp_path / "c")
