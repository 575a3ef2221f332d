"""A worker's stages: what overlaps, what is blamed for what, and when the engine rests."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest

from xtoken.pipeline.capture.worker_threads import Prepared, Stages
from xtoken.pipeline.executors.protocol import Lease
from xtoken.pipeline.store.files import DiskFull
from xtoken.pipeline.teachers.base import EngineLost
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import Part

WAIT = 120  # seconds until a test says that something never happens


def piece(size: int = 5):
    return SimpleNamespace(size=size)


@dataclass
class Toy:
    """Steps over shards of two batches of two windows; rows are the key, samples are the rows."""

    bad: dict[int, str] = field(default_factory=dict)
    published: list[int] = field(default_factory=list)
    hold: threading.Event | None = None  # publishing waits for it
    windows: int = 4

    def prepare(self, shard):
        if self.bad.get(shard) == "committed":
            return self.part(shard)
        if self.bad.get(shard) == "prepare":
            raise XtokenError(f"document of shard {shard} is bad")
        pieces = [piece() for _ in range(self.windows)]
        prompts = [np.array([shard, index]) for index in range(self.windows)]
        batches = [[0, 1], [2, 3]] if self.windows else []
        return Prepared(shard, pieces, prompts, batches, Counter())

    def sample(self, piece, rows):  # noqa: ARG002
        if rows is not None and self.bad.get(rows[0]) == "sample":
            raise XtokenError(f"rows of shard {rows[0]} cannot be packed")
        return rows or "no rows"

    def publish(self, prepared, samples):
        if self.hold is not None:
            assert self.hold.wait(WAIT)
        if self.bad.get(prepared.shard) == "full":
            raise DiskFull("no room")
        assert samples == [(prepared.shard, index) for index in range(self.windows)]
        self.published.append(prepared.shard)
        return self.part(prepared.shard)

    def part(self, shard):
        numbers = dict.fromkeys(("samples", "tokens", "rows", "entries", "text_bytes", "file_bytes"), 1)
        return Part(index=shard, sha256="0" * 64, **numbers)


@dataclass
class Engine:
    """Answers a batch late: when the next one is there, when nothing is ready, or when no more come."""

    bad: dict[int, Exception] = field(default_factory=dict)
    seen: list = field(default_factory=list)
    scored: threading.Event = field(default_factory=threading.Event)

    def stream(self, batches):
        waiting = []
        for batch in batches:
            self.seen.append(None if batch is None else int(batch[0][1][0]))
            assert batch is not None or waiting, "None is only given while something is unanswered"
            yield from self._answer(waiting)
            waiting = [] if batch is None else list(batch)
        yield from self._answer(waiting)

    def _answer(self, waiting):
        for key, ids in reversed(waiting):
            if int(ids[0]) in self.bad:
                raise self.bad[int(ids[0])]
            if int(ids[0]) == 1:
                self.scored.set()
            yield key, (int(ids[0]), int(ids[1]))


def serve(steps, engine, leases, audit=None, most_waiting=8):
    messages = []
    Stages(steps, engine, audit, most_waiting=most_waiting).serve(iter(leases), messages.append)
    return messages


def said(messages, kind):
    return [one.shard for one in messages if one.kind == kind]


def leases(*shards):
    return [Lease(shard) for shard in shards]


def test_every_shard_is_published_whole_and_in_the_order_of_its_windows():
    toy, engine = Toy(), Engine()
    messages = serve(toy, engine, leases(3, 1, 2))
    assert toy.published == [3, 1, 2]
    assert said(messages, "begun") == said(messages, "part") == [3, 1, 2]
    assert said(messages, "failed") == []
    assert [one.done for one in messages if one.kind == "progress"][:1] == [5]


def test_what_somebody_committed_is_not_done_again():
    toy, engine = Toy(bad={1: "committed"}), Engine()
    assert sorted(said(serve(toy, engine, leases(0, 1, 2)), "part")) == [0, 1, 2]
    assert toy.published == [0, 2]
    assert 1 not in engine.seen


def test_a_shard_without_rows_is_published_too():
    messages = serve(Toy(windows=0), Engine(), leases(0, 1))
    assert said(messages, "part") == [0, 1]


def test_the_engine_goes_on_while_a_shard_is_published():
    toy, engine = Toy(hold=threading.Event()), Engine()
    thread = threading.Thread(target=serve, args=(toy, engine, leases(0, 1)))
    thread.start()
    assert engine.scored.wait(WAIT), "shard 1 is scored though shard 0 is not published"
    assert toy.published == []
    toy.hold.set()
    thread.join(WAIT)
    assert toy.published == [0, 1]


@pytest.mark.parametrize("step", ["prepare", "sample"])
def test_a_bad_shard_fails_alone(step):
    messages = serve(Toy(bad={1: step}), Engine(), leases(0, 1, 2))
    assert said(messages, "part") == [0, 2]
    (failed,) = [one for one in messages if one.kind == "failed"]
    assert failed.shard == 1
    assert "shard 1" in str(failed.error)
    assert type(failed.error) is XtokenError


def test_an_error_that_befalls_all_keeps_its_class():
    messages = serve(Toy(bad={0: "full"}), Engine(), leases(0))
    (failed,) = [one for one in messages if one.kind == "failed"]
    assert type(failed.error) is DiskFull


def test_an_engine_that_raises_fails_what_is_in_it_and_the_worker_ends():
    toy = Toy()
    messages = serve(toy, Engine(bad={1: ValueError("CUDA error")}), leases(0, 1, 2, 3, 4))
    assert "part" in {one.kind for one in messages if one.shard == 0}, "what the engine was done with is published"
    assert 1 in said(messages, "failed")
    assert set(said(messages, "failed")) <= {1, 2}, "its neighbour is suspect too, nobody else"
    assert "CUDA error" in str(next(one for one in messages if one.kind == "failed").error)
    assert not {3, 4} & {*said(messages, "part"), *said(messages, "failed")}


def test_a_second_attempt_has_the_engine_to_itself():
    engine = Engine()
    serve(Toy(), engine, [Lease(0), Lease(1, 2), Lease(2)])
    seen = [shard for shard in engine.seen if shard is not None]
    assert seen == [0, 0, 1, 1, 2, 2]
    first, last = engine.seen.index(1), len(engine.seen) - engine.seen[::-1].index(1)
    assert engine.seen[first - 1] is None, "the engine was drained before it"
    assert engine.seen[last] is None, "and after it"


def test_the_audit_comes_after_the_first_commit_and_once():
    toy, engine = Toy(), Engine()
    audited = []
    messages = serve(
        toy, engine, leases(5, 6, 7), lambda shard: audited.append((shard, list(toy.published), set(engine.seen)))
    )
    assert audited == [(5, [5], {5})]
    assert toy.published == said(messages, "part") == [5, 6, 7]


def test_a_first_shard_that_fails_is_not_audited():
    audited = []
    messages = serve(Toy(bad={0: "sample"}), Engine(), leases(0, 1), audited.append)
    assert audited == [1]
    assert said(messages, "part") == [1]


def test_an_audit_that_refuses_stops_the_run():
    def refuse(shard):
        raise XtokenError(f"shard {shard} is of another model")

    messages = serve(Toy(), Engine(), leases(0, 1), refuse)
    assert said(messages, "part") == [], "the driver hears nothing that it could end the run over"
    assert [str(one.error) for one in messages if one.kind == "broken"] == ["shard 0 is of another model"]


def test_an_engine_that_ends_during_the_audit_ends_its_worker_only():
    def die(shard):
        raise EngineLost("the engine's process ended")

    messages = serve(Toy(), Engine(), leases(0, 1), die)
    assert not {"broken", "failed", "part"} & {one.kind for one in messages}


def until(condition):
    """Wait for another thread to make it true."""
    ends = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < ends, "it never happens"
        time.sleep(0.01)


def later(value):
    """What it is after a while in which other threads could have changed it."""
    time.sleep(0.2)
    return value()


@dataclass
class Slow(Toy):
    """One batch for each window, so that the engine can stop behind any; packing may wait for ``pack``."""

    pack: threading.Event | None = None
    windows: int = 40

    def prepare(self, shard):
        prepared = super().prepare(shard)
        return replace(prepared, batches=[[index] for index in range(self.windows)])

    def sample(self, piece, rows):
        if self.pack is not None:
            assert self.pack.wait(WAIT)
        return super().sample(piece, rows)


def test_a_slow_store_does_not_stop_the_engine_in_the_next_shard():
    toy, engine = Slow(hold=threading.Event()), Engine()
    thread = threading.Thread(target=serve, args=(toy, engine, leases(0, 1)))
    thread.start()
    assert engine.scored.wait(WAIT)
    until(lambda: engine.seen.count(1) == 40)
    assert toy.published == []
    toy.hold.set()
    thread.join(WAIT)
    assert toy.published == [0, 1]


def test_shards_that_wait_for_a_slow_store_are_few():
    """One is published, one waits, one is packed; the engine may be done with what the queue of rows holds besides."""
    toy, engine, found = Slow(hold=threading.Event()), Engine(), []
    thread = threading.Thread(target=lambda: found.append(serve(toy, engine, leases(*range(12)))))
    thread.start()
    until(lambda: 3 in engine.seen)
    assert later(lambda: max(shard for shard in engine.seen if shard is not None)) == 3
    toy.hold.set()
    thread.join(WAIT)
    assert toy.published == said(found[0], "part") == list(range(12))


@pytest.mark.parametrize("most", [2, 8, 20])
def test_rows_that_wait_to_be_packed_are_bounded_by_their_tokens(most):
    """Prompts have two tokens. Beside those that wait, one is packed, one is answered, one was asked for."""
    toy, engine = Slow(pack=threading.Event()), Engine()
    thread = threading.Thread(target=serve, args=(toy, engine, leases(0)), kwargs={"most_waiting": most})
    thread.start()
    until(lambda: len(engine.seen) >= most // 2 + 3)
    assert later(lambda: len(engine.seen)) == most // 2 + 3
    toy.pack.set()
    thread.join(WAIT)
    assert toy.published == [0]


def test_an_error_of_publishing_is_told_while_the_engine_is_further_on():
    toy, engine, found = Toy(hold=threading.Event(), bad={0: "full"}), Engine(), []
    thread = threading.Thread(target=lambda: found.append(serve(toy, engine, leases(0, 1, 2))))
    thread.start()
    assert engine.scored.wait(WAIT)
    toy.hold.set()
    thread.join(WAIT)
    assert said(found[0], "failed") == [0]
    assert said(found[0], "part") == toy.published == [1, 2]


def test_what_the_engine_was_done_with_is_published_though_it_raises():
    toy, found = Toy(hold=threading.Event()), []
    engine = Engine(bad={2: ValueError("CUDA error")})
    thread = threading.Thread(target=lambda: found.append(serve(toy, engine, leases(0, 1, 2))))
    thread.start()
    until(lambda: 2 in engine.seen)
    toy.hold.set()
    thread.join(WAIT)
    assert said(found[0], "part") == toy.published == [0, 1]
    assert said(found[0], "failed") == [2]
