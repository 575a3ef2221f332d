"""The mailbox between a worker's threads and the driver's calls, which may be lost and come again."""

import threading
import time

import pytest

from xtoken.pipeline.executors.protocol import Message
from xtoken.pipeline.executors.ray_actor import Mailbox, check_version
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import code_version


def progress(shard, done):
    return Message("progress", shard, done=done)


def test_messages_are_kept_until_the_driver_has_them():
    box = Mailbox()
    box.send(Message("open"))
    assert box.take(0, 0) == ([Message("open")], None)
    assert box.take(0, 0) == ([Message("open")], None), "the first answer was lost"
    assert box.take(1, 0) == ([], None)
    box.send(Message("failed", 3))
    assert box.take(1, 0) == ([Message("failed", 3)], None)
    assert box.take(2, 0) == ([], None)
    assert box.take(1, 0) == ([], None), "a call that was late; what the driver has is gone"


def test_only_the_last_progress_of_a_shard_travels():
    box = Mailbox()
    for done in range(5):
        box.send(progress(1, done))
        box.send(progress(2, done))
    assert box.take(0, 0)[0] == [progress(1, 4), progress(2, 4)]


def test_what_was_sent_once_does_not_change():
    box = Mailbox()
    box.send(progress(1, 1))
    assert box.take(0, 0)[0] == [progress(1, 1)]
    box.send(progress(1, 2))
    box.send(progress(1, 3))
    assert box.take(0, 0)[0] == [progress(1, 1), progress(1, 3)]
    assert box.take(2, 0)[0] == []


def test_progress_waits_for_company_and_everything_else_does_not():
    box = Mailbox()
    box.send(progress(1, 1))
    teller = threading.Timer(0.1, box.send, [Message("failed", 1)])
    teller.start()
    assert box.take(0, 60)[0] == [progress(1, 1), Message("failed", 1)]
    teller.join()


def test_work_begins_once_the_driver_knows_of_it(monkeypatch):
    monkeypatch.setattr("xtoken.pipeline.executors.ray_actor._HANDSHAKE_SECONDS", 600.0)
    box = Mailbox()
    began = threading.Event()

    def work():
        box.send(Message("begun", 1))
        began.set()

    worker = threading.Thread(target=work)
    worker.start()
    assert box.take(0, 60)[0] == [Message("begun", 1)]
    assert not began.wait(0.1), "sent is not received"
    assert box.take(1, 0) == ([], None)
    assert began.wait(60)
    worker.join()


def test_a_silent_driver_does_not_hold_work_up_for_ever(monkeypatch):
    monkeypatch.setattr("xtoken.pipeline.executors.ray_actor._HANDSHAKE_SECONDS", 0.05)
    Mailbox().send(Message("begun", 1))


def test_the_end_is_told_with_the_last_words():
    box = Mailbox()
    box.send(Message("failed", 1))
    box.close("")
    assert box.take(0, 60) == ([Message("failed", 1)], "")
    waiting = Mailbox()
    ender = threading.Timer(0.1, waiting.close, ["it broke"])
    ender.start()
    assert waiting.take(0, 60) == ([], "it broke")
    ender.join()


def test_many_threads_lose_nothing():
    box, got, seen = Mailbox(), [], 0
    talkers = [
        threading.Thread(target=lambda start=start: [box.send(Message("failed", start + i)) for i in range(200)])
        for start in (0, 1000, 2000)
    ]
    for talker in talkers:
        talker.start()
    end = time.monotonic() + 60
    while len(got) < 600 and time.monotonic() < end:
        messages, _ = box.take(seen, 0.1)
        seen += len(messages)
        got += [one.shard for one in messages]
    assert sorted(got) == sorted(start + i for start in (0, 1000, 2000) for i in range(200))
    for start in (0, 1000, 2000):
        assert [shard for shard in got if start <= shard < start + 1000] == list(range(start, start + 200))


def test_another_version_is_refused_naming_both():
    check_version(code_version())
    with pytest.raises(XtokenError, match=rf"has xtoken {code_version()}, the run was started by xtoken 0\.0\.1"):
        check_version("0.0.1")
