"""The rules by which shards are leased, with a clock that the test sets."""

import random

import pytest

from xtoken.pipeline.executors import leases as module
from xtoken.pipeline.executors.leases import ATTEMPTS, Leases
from xtoken.pipeline.executors.protocol import Message
from xtoken.pipeline.store.files import DiskFull
from xtoken.schemas.errors import Unreachable, XtokenError
from xtoken.schemas.manifest import Part


class Table:
    """A ``Leases`` with workers that say what the test wants; remembers all events."""

    def __init__(self, shards=range(4), workers=1, ahead=1, lease_seconds=10.0):
        self.now, self.events = 100.0, []
        self.leases = Leases(shards, ahead, self.events.append, lease_seconds, lambda: self.now)
        for worker in range(1, workers + 1):
            self.opens(worker)

    def opens(self, worker):
        self.leases.started(worker, slot=worker + 10)
        self.leases.receive(worker, Message("open", place="here"))

    def granted(self, worker):
        return [(lease.shard, lease.attempt) for lease in self.leases.grant(worker)]

    def begins(self, worker, shard):
        self.leases.receive(worker, Message("begun", shard))

    def tells(self, worker, shard):
        self.leases.receive(worker, Message("progress", shard, done=1))

    def commits(self, worker, shard):
        self.leases.receive(worker, Message("part", shard, part=part(shard)))

    def fails(self, worker, shard, error=None):
        self.leases.receive(worker, Message("failed", shard, error=error or ValueError("it tastes bad")))

    def kinds(self, *only):
        return [event.kind for event in self.events if not only or event.kind in only]


def part(shard):
    return Part(index=shard, samples=1, tokens=1, rows=1, entries=1, text_bytes=1, file_bytes=1, sha256="0" * 64)


def test_shards_go_out_in_order_until_all_are_committed():
    table = Table(range(3))
    for shard in range(3):
        assert table.granted(1) == [(shard, 1)]
        assert table.granted(1) == [], "one at a time"
        assert table.leases.holds(1)
        table.begins(1, shard)
        table.commits(1, shard)
    assert not table.leases.unfinished
    assert not table.leases.holds(1)
    assert table.leases.failed == {}
    assert table.kinds() == ["starting", "opened", *["leased", "begun", "part"] * 3]
    assert {event.worker for event in table.events} == {11}, "events name slots"


def test_a_worker_gets_nothing_before_it_is_open():
    table = Table(workers=0)
    table.leases.started(1, 0)
    assert table.granted(1) == []
    assert table.leases.waiting == 4


def test_shards_are_leased_ahead_but_towards_the_end_each_worker_gets_one():
    table = Table(range(7), workers=2, ahead=3)
    assert table.granted(1) == [(0, 1), (1, 1), (2, 1)]
    assert table.granted(2) == [(3, 1), (4, 1), (5, 1)], "two were waiting for two workers when the third was given"
    assert table.granted(1) == []
    table = Table(range(4), workers=3, ahead=3)
    assert table.granted(1) == [(0, 1), (1, 1)]
    assert table.granted(2) == [(2, 1)]
    assert table.granted(3) == [(3, 1)]


def test_a_failed_shard_goes_to_the_end_and_is_quarantined_the_third_time():
    table = Table(range(2))
    order = []
    while table.leases.unfinished:
        (lease,) = table.granted(1)
        order.append(lease)
        table.begins(1, lease[0])
        if lease[0] == 0:
            table.fails(1, 0)
        else:
            table.commits(1, 1)
    assert order == [(0, 1), (1, 1), (0, 2), (0, 3)]
    assert table.leases.failed == {0: "it tastes bad"}
    assert table.kinds("failed", "set_aside") == ["failed"] * ATTEMPTS + ["set_aside"]


def test_only_what_a_dead_worker_had_begun_is_held_against_it():
    table = Table(range(3), ahead=3)
    assert len(table.granted(1)) == 3
    table.begins(1, 0)
    table.leases.gone(1, "died", "signal 9")
    table.opens(2)
    assert table.granted(2) == [(2, 1), (1, 1)], "what was not begun comes first, as if untouched"
    assert table.granted(2) == [], "what was begun gets a worker of its own"
    for shard in (2, 1):
        table.commits(2, shard)
    assert table.granted(2) == [(0, 2)]
    for worker in (2, 3):
        table.begins(worker, 0)
        table.leases.gone(worker, "died", "signal 9")
        table.opens(worker + 1)
        table.granted(worker + 1)
    assert table.leases.failed == {0: "signal 9"}


@pytest.mark.parametrize("kind", ["retired", "released", "lost"])
def test_an_end_that_is_no_fault_of_the_shard_is_not_held_against_it(kind):
    table = Table([0])
    for worker in range(1, 2 * ATTEMPTS):
        assert len(table.granted(worker)) == 1
        table.begins(worker, 0)
        table.leases.gone(worker, kind)
        table.opens(worker + 1)
    assert table.leases.failed == {}
    assert table.leases.unfinished


def test_a_shard_that_takes_its_machine_down_ten_times_is_quarantined():
    table = Table([0])
    worker = 1
    while table.leases.unfinished:
        table.granted(worker)
        table.begins(worker, 0)
        table.leases.gone(worker, "lost", "its machine is gone")
        worker += 1
        table.opens(worker)
    assert worker == 1 + module._LOSSES
    assert table.leases.failed == {0: "its machine is gone, 10 times while at this shard"}


def test_progress_keeps_a_lease_and_silence_ends_it():
    table = Table([0], workers=2)
    table.granted(1)
    table.begins(1, 0)
    for _ in range(5):
        table.now += 9
        table.tells(1, 0)
        assert table.leases.overdue() == []
    table.now += 11
    assert table.leases.overdue() == []
    assert table.kinds("overdue") == ["overdue"]
    assert not table.leases.holds(1)
    assert table.granted(1) == [], "who is overdue gets nothing"
    assert table.granted(2) == [(0, 2)]


def test_who_stays_silent_for_another_lease_is_hopeless():
    table = Table([0])
    table.granted(1)
    table.begins(1, 0)
    table.now += 11
    assert table.leases.overdue() == []
    table.now += 9
    assert table.leases.overdue() == []
    table.now += 2
    assert table.leases.overdue() == [1]
    table.leases.gone(1, "died", "killed")
    table.opens(2)
    assert table.granted(2) == [(0, 2)]
    assert table.leases._failures[0] == 1, "blamed once, for the silence"


def test_a_worker_that_speaks_again_is_overdue_no_more():
    table = Table(range(2))
    table.granted(1)
    table.now += 11
    table.leases.overdue()
    table.now += 20
    table.tells(1, 0)
    assert table.leases.overdue() == []
    assert table.granted(1) == [(0, 1)], "it had not begun the shard, which stayed first"


def test_idle_and_loading_workers_are_never_overdue():
    table = Table(range(1), workers=2)
    table.granted(1)
    table.leases.started(3, 0)
    table.now += 5
    table.tells(1, 0)
    table.now += 6
    assert table.leases.overdue() == []
    assert table.kinds("overdue") == []


def test_time_spent_idle_does_not_count_for_a_new_lease():
    table = Table([0])
    table.now += 1000
    table.granted(1)
    assert table.leases.overdue() == []
    assert table.kinds("overdue") == []


def test_the_first_commit_counts_and_a_later_one_is_late():
    table = Table(range(2), workers=2)
    table.granted(1)
    table.begins(1, 0)
    table.now += 11
    table.leases.overdue()
    assert table.granted(2) == [(1, 1)]
    table.commits(2, 1)
    assert table.granted(2) == [(0, 2)]
    table.commits(1, 0)
    assert not table.leases.unfinished
    table.commits(2, 0)
    assert table.kinds("part", "late") == ["part", "part", "late"]


def test_a_late_commit_saves_a_shard_from_being_leased_again_and_from_being_quarantined():
    table = Table([0], workers=ATTEMPTS + 1)
    for worker in range(1, ATTEMPTS + 1):
        assert table.granted(worker) == [(0, worker)]
        table.begins(worker, 0)
        table.now += 11
        table.leases.overdue()
    assert list(table.leases.failed) == [0]
    table.commits(1, 0)
    assert table.leases.failed == {}
    table = Table([0], workers=2)
    table.granted(1)
    table.now += 11
    table.leases.overdue()
    table.commits(1, 0)
    assert table.granted(2) == []
    assert table.leases.waiting == 0


def test_a_failure_after_the_lease_was_taken_away_counts_once():
    table = Table([0], workers=2)
    table.granted(1)
    table.begins(1, 0)
    table.now += 11
    table.leases.overdue()
    table.fails(1, 0)
    assert table.leases._failures[0] == 1
    assert table.granted(2) == [(0, 2)]


def test_what_would_befall_every_shard_is_raised():
    table = Table()
    table.granted(1)
    with pytest.raises(DiskFull, match="no room"):
        table.fails(1, 0, DiskFull("no room"))
    with pytest.raises(XtokenError, match="no such model"):
        table.leases.receive(1, Message("broken", error=XtokenError("no such model")))


def test_an_outage_is_waited_out_ever_longer_and_no_shard_is_blamed():
    table = Table(range(2))
    assert table.granted(1) == [(0, 1)]
    pauses = []
    for _ in range(8):
        table.begins(1, 0)
        table.fails(1, 0, Unreachable("503"))
        start = table.now
        while not (lease := table.granted(1)):
            table.now += 0.5
        assert lease == [(0, 1)]
        pauses.append(table.now - start)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert table.kinds("outage") == ["outage"] * 8
    assert table.leases.failed == {}
    table.commits(1, 0)
    assert table.granted(1) == [(1, 1)]
    table.fails(1, 1, Unreachable("503"))
    table.now += 1
    assert table.granted(1) == [(1, 1)], "after a success it starts again at one second"


def test_an_outage_of_several_workers_is_one():
    table = Table(range(4), workers=3)
    for worker in (1, 2, 3):
        table.granted(worker)
    for worker in (1, 2, 3):
        table.fails(worker, worker - 1, Unreachable("503"))
    assert table.kinds("outage") == ["outage"]


def test_an_outage_without_end_ends_the_run():
    table = Table([0])

    def fail_each_minute():
        for _ in range(100):
            table.granted(1)
            table.fails(1, 0, Unreachable("503"))
            table.now += 60

    with pytest.raises(module.StopRun, match="nothing could be committed for 30 minutes: 503"):
        fail_each_minute()
    assert 100 + module._PATIENCE < table.now < 100 + module._PATIENCE + 180


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_shard_ends_once(seed):
    """Workers that do anything at random: each shard is committed or quarantined, and reported so exactly once."""
    dice = random.Random(seed)
    table = Table(range(20), workers=4, ahead=2)
    held = {worker: [] for worker in range(1, 5)}
    number = 4
    for _ in range(5000):
        if not table.leases.unfinished:
            break
        table.now += dice.random() * 4
        for hopeless in table.leases.overdue():
            table.leases.gone(hopeless, "died", "silence")
            del held[hopeless]
        for worker in list(held):
            held[worker] += [lease.shard for lease in table.leases.grant(worker)]
            act = dice.choice(["idle", "idle", "begin", "commit", "commit", "fail", "die", "lose"])
            if act in ("die", "lose"):
                table.leases.gone(worker, "died" if act == "die" else "lost", act)
                del held[worker]
            elif held[worker] and act == "begin":
                table.begins(worker, held[worker][0])
            elif held[worker] and act == "commit":
                table.commits(worker, held[worker].pop(0))
            elif held[worker] and act == "fail":
                table.fails(worker, held[worker].pop(0))
        while len(held) < 4:
            number += 1
            table.opens(number)
            held[number] = []
    parts = [event.shard for event in table.events if event.kind == "part"]
    assert not table.leases.unfinished
    assert len(parts) == len(set(parts))
    aside = {event.shard for event in table.events if event.kind == "set_aside"}
    late = {event.shard for event in table.events if event.kind == "late"}
    assert set(table.leases.failed) == aside - late
    assert {*parts, *aside} == set(range(20))
