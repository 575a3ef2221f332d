"""What --dry-run makes of a cluster: a real Ray with four GPUs that it only believes in."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.executors.fleet import Fleet, fleet_of_ray
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """Which this process is connected to: no run starts or leaves it."""
    ray.init("local", num_cpus=8, num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def config(**flags: object) -> PrecomputeConfig:
    known: dict[str, object] = {"corpus": "c", "teacher": "bytes", "backend": "hf", "out": "o", "ray": "auto"}
    return PrecomputeConfig.from_flat(**known | flags)


@pytest.mark.parametrize(
    ("flags", "fleet"),
    [
        ({"backend": "vllm", "tensor_parallel": 2}, Fleet(2, 2.0, 2.0)),
        ({"gpus_per_worker": 0.5}, Fleet(8, 0.5, 4.0)),
        ({"workers": 3}, Fleet(3, 1.0, 3.0)),
        ({"workers": 3, "device": "cpu"}, Fleet(3, 0.0, 1.0)),
        ({"workers": 3, "device": "cpu", "backend": "fake"}, Fleet(3, 0.0, 3.0)),
    ],
)
def test_workers_and_gpus(flags: dict[str, object], fleet: Fleet) -> None:
    asked = config(**flags)
    assert fleet_of_ray(asked.run, asked.teacher) == fleet


def test_a_dry_run_asks_the_cluster_first_and_takes_its_pilot_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    corpus = f"{folder}/corpus.txt"
    with open(corpus, "w") as file:
        file.write("some words\n" * 500)
    flags = {"corpus": corpus, "out": f"{folder}/out", "backend": "fake", "k": 4, "shard_bytes": 100}
    monkeypatch.setattr("xtoken.pipeline.capture.estimate.dry_run.take_pilot", None)  # not in this process
    found = dry_run(config(**flags, gpus_per_worker=0.5, gpu_price=2.0, dry_run=True), Silent())
    assert (found["workers"], found["gpus"]) == (8, 4.0)
    assert found["cost"] == pytest.approx(found["gpu_hours"] * 2, abs=0.01)
    with pytest.raises(XtokenError, match="the largest node that is alive now has 4"):
        dry_run(config(**flags, gpus_per_worker=5.0), Silent())
    with pytest.raises(XtokenError, match="nothing-here") as caught:
        dry_run(config(**{**flags, "corpus": f"{folder}/nothing-here.txt"}, gpus_per_worker=0.5), Silent())
    assert "\n" not in str(caught.value), "what it says there is what is said here"
