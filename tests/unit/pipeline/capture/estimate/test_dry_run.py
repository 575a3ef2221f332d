"""--dry-run against the run that the same flags then make."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.executors.fleet import Fleet, fleet_here, gpus_of_worker
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.usefixtures("one_worker_is_here")


@pytest.fixture
def flags(tmp_path):
    lines = [json.dumps({"text": f"document {number}: " + "some words, and more. " * 40}) for number in range(20)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    out = str(tmp_path / "out")
    return {"corpus": str(tmp_path / "corpus.jsonl"), "teacher": "bytes", "backend": "fake", "k": 4, "out": out}


def config(flags, **changes):
    return PrecomputeConfig.from_flat(**({"shard_bytes": 3000, "dry_run": True} | flags | changes))


def listing(folder: str) -> dict[str, tuple[int, int]]:
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def test_before_a_run_everything_is_left_and_nothing_is_made(flags):
    found = dry_run(config(flags), Silent())
    assert not Path(flags["out"]).exists()
    assert found["plan"] == "would be made"
    assert found["shards"] == found["shards_left"] > 3
    assert found["tokens"] == found["tokens_left"] == found["text_bytes"]
    manifest = precompute(config(flags, dry_run=False), Silent())
    assert found["shards"] == len(manifest.parts)
    assert found["tokens"] == sum(part.tokens for part in manifest.parts)
    # small parts, each with its footer: the pilot's windows fill other row groups than the run's
    assert found["disk_bytes_left"] == pytest.approx(sum(part.file_bytes for part in manifest.parts), rel=0.25)
    assert found["disk_bytes"] > found["disk_bytes_left"]
    assert found["disk_bytes_free"] > 0


def test_of_a_run_that_is_half_done(flags):
    precompute(config(flags, dry_run=False), Silent())
    out = Path(flags["out"])
    for name in ("commits/part-00001.json", "commits/part-00002.json", "manifest.json"):
        (out / name).unlink()
    before = listing(flags["out"])
    found = dry_run(config(flags), Silent())
    assert (found["plan"], found["shards_left"], found["shards_done"]) == ("there", 2, found["shards"] - 2)
    assert 0 < found["tokens_left"] < found["tokens"]
    assert listing(flags["out"]) == before


def test_of_a_finished_run_nothing_is_left(flags):
    precompute(config(flags, dry_run=False), Silent())
    found = dry_run(config(flags, gpu_price=2.0), Silent())
    assert (found["shards_left"], found["tokens_left"], found["hours"], found["cost"]) == (0, 0, 0.0, 0.0)


def test_of_a_cell_its_share(flags):
    whole = dry_run(config(flags), Silent())
    cells = [dry_run(config(flags, cell=f"{which}/2"), Silent()) for which in (1, 2)]
    assert sum(cell["shards"] for cell in cells) == whole["shards"]
    assert sum(cell["text_bytes"] for cell in cells) == whole["text_bytes"]


def test_hours_and_cost_follow_from_the_pilot_and_the_fleet(flags, monkeypatch):
    monkeypatch.setattr("xtoken.pipeline.capture.estimate.dry_run.fleet_here", lambda *_: Fleet(4, 2.0, 4.0))
    found = dry_run(config(flags, gpu_price=3.0), Silent())
    assert (found["workers"], found["gpus"]) == (4, 8.0)
    seconds = found["tokens_left"] / found["rows_per_s_of_one"] / 4
    assert found["hours"] * 3600 >= seconds - 0.2
    assert found["gpu_hours"] == pytest.approx(found["hours"] * 8, abs=1e-3)
    assert found["cost"] == pytest.approx(found["gpu_hours"] * 3, abs=0.01)


@pytest.mark.thorough
@pytest.mark.usefixtures("vllm_gives_the_top_k")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"k": 5}, "holds another run"),
        ({"shard_bytes": 1000}, "holds another run"),
        ({"teacher": "/nowhere"}, "/nowhere"),
        ({"corpus": "/nowhere.jsonl"}, r"/nowhere\.jsonl"),
        ({"k": 255, "out": "{out}-fresh"}, None),
        ({"temperatures": [2.0], "backend": "vllm"}, "needs whole teacher rows"),
    ],
)
def test_what_the_run_would_refuse_is_refused(flags, changes, said):
    precompute(config(flags, dry_run=False), Silent())
    before = listing(flags["out"])
    changes = {name: value.format(**flags) if name == "out" else value for name, value in changes.items()}
    if said is None:
        assert dry_run(config(flags, **changes), Silent())["shards_left"] > 0
    else:
        with pytest.raises(XtokenError, match=said):
            dry_run(config(flags, **changes), Silent())
    assert listing(flags["out"]) == before


def test_a_folder_of_something_else_is_refused(flags):
    (Path(flags["out"]) / "data").mkdir(parents=True)
    with pytest.raises(XtokenError, match="holds 'data' but no capture"):
        dry_run(config(flags), Silent())


def test_the_command_line(flags):
    words = ["precompute", flags["corpus"], "--teacher", "bytes", "--backend", "fake", "--out", flags["out"]]
    result = CliRunner().invoke(cli.app, [*words, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["shards"] == 1
    assert not Path(flags["out"]).exists()


def worker_of(flags, **changes):
    made = config(flags, **changes)
    return made.run, made.teacher


def test_fleets(flags, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    here = worker_of(flags, backend="vllm", tensor_parallel=2, workers=2)
    assert fleet_here(*here, "NVIDIA H100") == Fleet(2, 2.0, 2.0)
    assert fleet_here(*worker_of(flags, backend="hf", workers=8), "NVIDIA H100") == Fleet(8, 0.5, 4.0)
    assert fleet_here(*worker_of(flags, backend="hf", workers=8), "cpu") == Fleet(8, 0.0, 1.0)
    assert fleet_here(*worker_of(flags, workers=8), "cpu") == Fleet(8, 0.0, 8.0)
    assert gpus_of_worker(*worker_of(flags, ray="auto", gpus_per_worker=0.25), "NVIDIA H100") == 0.25
    assert gpus_of_worker(*worker_of(flags, ray="auto", backend="vllm", tensor_parallel=4), "NVIDIA H100") == 4.0
    assert gpus_of_worker(*worker_of(flags, ray="auto", gpus_per_worker=0.25), "cpu") == 0.0
