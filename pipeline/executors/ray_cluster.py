"""The Ray cluster that a run is on: joining it, and what of its machines a worker takes."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from xtoken.schemas.errors import XtokenError

_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Node:
    """A machine that is alive."""

    id: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Share:
    """What one worker takes of one machine."""

    cpus: int
    gpus: float

    def places(self, nodes: Sequence[Node]) -> int:
        """Workers that the machines have room for."""
        return sum(
            int(min(node.cpus // self.cpus, node.gpus // self.gpus if self.gpus else node.cpus)) for node in nodes
        )


def import_ray() -> ModuleType:
    """The package.

    Raises:
        XtokenError: it is missing.
    """
    try:
        import ray
    except ImportError:
        raise XtokenError("--ray needs Ray; pip install 'xtoken[ray]'") from None
    return ray


@contextlib.contextmanager
def joined(address: str, workers: int) -> Iterator[None]:
    """Be connected to Ray inside the block; a connection that this process has already is used and left as it is.

    Args:
        address: local (a Ray of this run alone is started here), auto (the one this machine belongs to), HOST:PORT.
        workers: room that a Ray started here is to have at least.

    Raises:
        XtokenError: there is no cluster, or it does not let us in.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    with _quiet():
        _connect(ray, address, workers)
        try:
            yield
        finally:
            ray.shutdown()


def alive() -> list[Node]:
    """Machines that the cluster has now and that can run something."""
    nodes = [_node(entry) for entry in import_ray().nodes() if entry["Alive"]]
    return [node for node in nodes if node.cpus >= 1]


def share_of(
    nodes: Sequence[Node], workers: int | None, gpus_per_worker: float | None, tensor_parallel: int, device: str
) -> Share:
    """What each worker takes; all of it is of one machine.

    Without GPUs the CPUs are divided among the workers: Ray lets a worker compute on as many threads as it has CPUs.

    Raises:
        XtokenError: no machine has as many GPUs as one worker needs.
    """
    largest = max(nodes, key=lambda node: node.gpus, default=Node("", "", 0, 0))
    gpus = gpus_per_worker
    if gpus is None:
        gpus = float(tensor_parallel) if largest.gpus and device != "cpu" else 0.0
    if gpus > largest.gpus:
        has = f"{largest.gpus:g} (on {largest.host})" if largest.gpus else "none"
        raise XtokenError(
            f"a worker needs {gpus:g} GPUs of one node, and the largest node that is alive now has {has}; "
            "use a smaller --tensor-parallel or --gpus-per-worker, or start the cluster with larger nodes"
        )
    return Share(1 if gpus else _cpus(nodes, workers or 1), gpus)


def _cpus(nodes: Sequence[Node], workers: int) -> int:
    """The most CPUs for each with which all workers have a place, or 1."""
    most = int(max((node.cpus for node in nodes), default=1))
    for cpus in range(most, 1, -1):
        if sum(node.cpus // cpus for node in nodes) >= workers:
            return cpus
    return 1


def _node(entry: dict[str, Any]) -> Node:
    resources = entry["Resources"]
    return Node(entry["NodeID"], entry["NodeManagerHostname"], resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _connect(ray: ModuleType, address: str, workers: int) -> None:
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        common |= {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
    else:
        _knock(address)
    try:
        ray.init(address=address, **common)
    except Exception as error:
        raise XtokenError(
            f"--ray {address}: {error}\n'ray start --head' starts a cluster on this machine, 'ray start --address=...' "
            "joins this machine to one; --ray local needs neither"
        ) from error


def _knock(address: str) -> None:
    """Refuse at once what Ray would try for minutes and then exit over."""
    if ":" not in address:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise XtokenError(
            f"--ray {address}: nothing answers there ({error}); give the address that 'ray start --head' printed, "
            "or say --ray auto on a machine of the cluster"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray prints to stdout what befalls its workers, which a run tells by itself and ``--json`` must be free of."""
    from ray._private import worker

    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
