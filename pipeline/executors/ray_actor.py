"""What runs inside a Ray actor: one worker in a thread of its own, and a mailbox that the driver empties.

Calls may be lost with a connection and are made again then, so messages are kept until the driver confirms
them, and a call that comes twice counts once.
"""

import pickle
import queue
import signal
import socket
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from xtoken.pipeline.executors.local import die_with_parent
from xtoken.pipeline.executors.protocol import Job, Lease, Message, Worker, portable
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.cache_folders import settle_home
from xtoken.schemas.manifest import code_version

_HANDSHAKE_SECONDS = 5.0


@dataclass(frozen=True)
class Report:
    """A worker's answer to the driver.

    Attributes:
        messages: what the driver does not have yet, oldest first.
        node: Ray's id of the machine.
        end: None while the worker goes on; why it ended otherwise, empty if it returned by itself.
    """

    messages: list[Message]
    node: str
    end: str | None


class Mailbox:
    """Messages on their way to the driver; all threads of a worker write, the driver's calls read."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._kept: list[Message] = []
        self._taken = 0  # messages that the driver is known to have
        self._shown = 0  # messages that it was sent at least once, which must not change any more
        self._end: str | None = None

    def send(self, message: Message) -> None:
        """See ``xtoken.pipeline.executors.protocol.Send``.

        Work on a shard begins only once the driver knows of it (or keeps silent for long): should this process die of
        the shard, the shard must not come back as if untouched.
        """
        with self._changed:
            if message.kind == "progress":
                unseen = self._kept[self._shown - self._taken :]
                same = [old for old in unseen if old.kind == "progress" and old.shard == message.shard]
                self._kept = [old for old in self._kept if not any(old is one for one in same)]
            self._kept.append(message)
            self._changed.notify_all()
            if message.kind == "begun":
                number = self._taken + len(self._kept)
                self._changed.wait_for(lambda: self._taken >= number, _HANDSHAKE_SECONDS)

    def close(self, why: str) -> None:
        """Nothing more will be sent."""
        with self._changed:
            self._end = why
            self._changed.notify_all()

    def take(self, seen: int, patience: float) -> tuple[list[Message], str | None]:
        """Messages from the ``seen``-th on, and how the worker ended; waits for more than mere progress."""
        with self._changed:
            if seen > self._taken:
                del self._kept[: seen - self._taken]
                self._taken = seen
                self._changed.notify_all()
            self._changed.wait_for(self._pressing, patience)
            self._shown = self._taken + len(self._kept)
            return list(self._kept), self._end

    def _pressing(self) -> bool:
        return self._end is not None or any(message.kind != "progress" for message in self._kept)


class RayWorker:
    """The actor; its methods return at once or within ``patience``, whatever the worker does."""

    def __init__(self, version: str, job: bytes, slot: int) -> None:
        import ray

        die_with_parent(signal.SIGKILL)  # a raylet that is killed leaves its workers, and what they hold of a GPU
        self._node = ray.get_runtime_context().get_node_id()
        self._mailbox = Mailbox()
        self._leases: queue.SimpleQueue[Lease | None] = queue.SimpleQueue()
        self._calls: set[int] = set()
        threading.Thread(target=self._work, args=(version, job, slot), name="xtoken-worker", daemon=True).start()

    def lease(self, call: int, leases: list[Lease]) -> None:
        """Queue leases for the worker; each call has a number of its own."""
        if call not in self._calls:
            self._calls.add(call)
            for lease in leases:
                self._leases.put(lease)

    def close(self) -> None:
        """No leases will come any more."""
        self._leases.put(None)

    def messages(self, seen: int, patience: float) -> Report:
        """What has happened since the driver had ``seen`` messages, after at most ``patience`` seconds."""
        messages, end = self._mailbox.take(seen, patience)
        return Report(messages, self._node, end)

    def _work(self, version: str, job: bytes, slot: int) -> None:
        why = ""
        try:
            self._serve(version, job, slot)
        except BaseException:
            why = traceback.format_exc().rstrip()
        self._mailbox.close(why)  # the engine is gone by now, as far as it ends with its last user

    def _serve(self, version: str, job: bytes, slot: int) -> None:
        worker = self._open(version, job, slot)
        if worker is not None:
            worker.serve(self._next_leases(), self._mailbox.send)

    def _open(self, version: str, job: bytes, slot: int) -> Worker | None:
        try:
            check_version(version)
            settle_home()  # of this machine, which may have none that can be written
            described: Job = pickle.loads(job)
            worker = described.open(slot)
        except Exception as error:
            self._mailbox.send(Message("broken", error=portable(error), place=socket.gethostname()))
            return None
        self._mailbox.send(Message("open", place=socket.gethostname()))
        return worker

    def _next_leases(self) -> Iterator[Lease]:
        while (lease := self._leases.get()) is not None:
            yield lease


def check_version(drivers: str) -> None:
    """Refuse to work for a driver of another version: parts of one capture are written by one version.

    Raises:
        XtokenError: naming both.
    """
    ours = code_version()
    if ours != drivers:
        raise XtokenError(
            f"node {socket.gethostname()} has xtoken {ours}, the run was started by xtoken {drivers}; "
            f"install xtoken {drivers} on every node of the cluster"
        )
