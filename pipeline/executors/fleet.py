"""How many workers and GPUs a run's settings mean, here or on a cluster."""

from dataclasses import dataclass

from xtoken.pipeline.executors.gpus import visible_gpus
from xtoken.schemas.configs.capture import RunGroup, TeacherGroup


@dataclass(frozen=True)
class Fleet:
    """The workers of a run.

    Attributes:
        workers: how many.
        gpus: what each of them has, a fraction where several share one; 0 on CPU.
        engines: as many as run at full speed; workers that share a processor count as one.
    """

    workers: int
    gpus: float
    engines: float


def gpus_of_worker(run: RunGroup, teacher: TeacherGroup, device: str) -> float:
    """GPUs that one worker has, a fraction where several share one.

    Args:
        run: how many workers there are, and where.
        teacher: what each of them runs.
        device: as the engine names it (see ``TeacherInfo``): ``cpu``, or a GPU's name.
    """
    if device == "cpu" or teacher.backend == "server":  # whose GPUs are not ours to count
        return 0.0
    if run.gpus_per_worker is not None:
        return run.gpus_per_worker
    if run.ray is not None or teacher.device != "auto":
        return float(teacher.tensor_parallel)
    # workers of one machine share what it has
    return min(float(teacher.tensor_parallel), max(1, len(visible_gpus())) / (run.workers or 1))


def fleet_here(run: RunGroup, teacher: TeacherGroup, device: str) -> Fleet:
    """The workers of a run on this machine; ``device`` as for ``gpus_of_worker``."""
    workers, gpus = run.workers or 1, gpus_of_worker(run, teacher, device)
    if not teacher.takes_gpus:
        return Fleet(workers, 0.0, workers)
    # on CPU one real engine uses all cores already
    return Fleet(workers, gpus, max(1.0, int(workers * gpus / teacher.tensor_parallel)))


def fleet_of_ray(run: RunGroup, teacher: TeacherGroup) -> Fleet:
    """The workers of a run on a Ray cluster as it is now.

    Raises:
        XtokenError: no Ray, no cluster, or no machine of it has the GPUs of one worker.
    """
    from xtoken.pipeline.executors.ray_cluster import alive, joined, share_of

    assert run.ray is not None
    with joined(run.ray, run.workers or 1):
        nodes = alive()
        share = share_of(nodes, run.workers, run.gpus_per_worker, teacher.tensor_parallel, teacher.device)
    workers = run.workers or max(1, share.places(nodes) if share.gpus else 1)
    if not teacher.takes_gpus:
        return Fleet(workers, share.gpus, workers)
    if not share.gpus:
        return Fleet(workers, 0.0, min(workers, len(nodes)))
    return Fleet(workers, share.gpus, workers * min(1.0, share.gpus / teacher.tensor_parallel))
