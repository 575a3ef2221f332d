"""Two attempts at one part: a worker that was given up and comes back, and two that publish at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_runs import Run, documents, events, same_as

from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import Figures, committed, data_name, publish_part
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.manifest import Part

LEASE = 10.0  # seconds; after twice as long a worker is killed


def test_a_worker_that_stalls_past_its_lease_and_then_finishes(undisturbed, tmp_path, figure):
    """The worker that has shards 0 and 1 stalls in 0 until another one has committed that."""
    out, notes = tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    texts = documents()
    # a line of the first document of a shard: what its holder waits for
    waits = {line_of(undisturbed, 0): "commit 0", line_of(undisturbed, 1): "published 0"}
    last = max(committed(undisturbed.out))
    waits[line_of(undisturbed, last)] = "overdue"
    assert all(sum(line in text for text in texts) == 1 for line in waits)
    config = undisturbed.changed(out=str(out), lease_seconds=LEASE)
    Run(config, tmp_path, {"folder": str(notes), "waits": waits}).finish()
    seen = events(out)
    assert seen["overdue"] == 1
    assert seen["late"] >= 1, "both attempts finished"
    assert len(list(notes.glob("published-*-0"))) == 2
    assert seen["died"] == seen["set_aside"] == 0
    same_as(Path(undisturbed.out), out)
    figure(f"stall: beyond a lease of {LEASE:g} s, two attempts at a part published, one record, same bytes")


def line_of(config: PrecomputeConfig, shard: int) -> str:
    """A line that only one document has, from the middle of a shard's first window."""
    text = next(iter_capture(config.out, ["text"], [shard]))["text"][0].as_py()
    whole = "".join(documents())
    return next(line for line in text.splitlines() if len(line) > 30 and whole.count(line) == 1)


class Twins:
    """Writes the bytes of one attempt, and has all attempts go on together after each step."""

    def __init__(self, attempts: int) -> None:
        self._barrier = threading.Barrier(attempts)

    def write(self, url: str) -> dict[str, int]:
        self._barrier.wait(120)
        Folder(url.rpartition("/")[0]).replace(url.rpartition("/")[2], b"the same bytes")
        self._barrier.wait(120)
        return {"documents": 1}

    def check(self, url: str) -> Figures:
        Folder(url.rpartition("/")[0]).read(url.rpartition("/")[2])
        return Figures(1, 1, 1, 1, 1)


ATTEMPTS, ROUNDS = 4, 25


@pytest.mark.parametrize("where", ["local", "s3"])
def test_attempts_that_publish_at_the_same_moment(where, tmp_path, request, monkeypatch, figure):
    root = str(tmp_path)
    if where == "s3":
        for name, value in request.getfixturevalue("s3_server").environment("alpha").items():
            monkeypatch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        root = "s3://alpha-store/same-moment"
    for index in range(ROUNDS):
        twins = Twins(ATTEMPTS)
        with ThreadPoolExecutor(ATTEMPTS) as pool:
            attempts = [pool.submit(publish_part, root, index, twins.write, twins.check) for _ in range(ATTEMPTS)]
            found: list[Part] = [attempt.result() for attempt in attempts]
        assert all(part == found[0] for part in found)
    folder = Folder(root)
    assert sorted(committed(root)) == list(range(ROUNDS))
    assert folder.names("data") == [data_name(index).rpartition("/")[2] for index in range(ROUNDS)]
    figure(f"publish ({where}): {ROUNDS} x {ATTEMPTS} attempts at the same moment, {ROUNDS} records, no file beside")
