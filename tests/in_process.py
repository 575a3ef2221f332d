"""Executors without processes, for tests and benchmarks: of align, and of captures."""

import os
from collections.abc import Sequence
from unittest import mock

from xtoken.pipeline.executors.protocol import Event, Job, Lease, Message, Watch


class InThisProcess:
    """Its worker sees what a test has changed, and starts in less time than a small part takes."""

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:  # noqa: ARG002
        """See ``Executor``."""
        worker = job.open()
        for shard in shards:
            worker.run(shard, 1)
        return {}


class InProcess:
    """An executor without processes: starting one takes longer than a small capture."""

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:
        """See ``Executor``; the first failure ends it."""
        failures: list[Exception] = []

        def receive(message: Message) -> None:
            # called by any of the worker's threads, and the others would wait for one that an error ended
            if message.error is not None:
                failures.append(message.error)
            elif message.kind == "part":
                watch.see(Event("part", shard=message.shard, part=message.part))

        with mock.patch.dict(os.environ):  # a worker chooses the GPUs of its process
            job.open().serve((Lease(shard) for shard in shards if not failures), receive)
        if failures:
            raise failures[0]
        return {}
