"""The processes that train together: what they add up, and how the model is shared among them.

``torchrun`` starts them; without it there is one. Every collective is called by all ranks in the same order.
"""

import atexit
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.student.model import decoder_layers
from xtoken.trainer.student.outline import receive

# A rank that reads from a slow store, or saves, keeps the others waiting; one that is gone must not for ever.
_PATIENCE = timedelta(minutes=30)
_LOOKS = 1000  # ten seconds in all, after which a thread that still works is left to its fate


@dataclass(frozen=True)
class Ranks:
    """This process among ``size``."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - frozen

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element by element over all ranks, in float64."""
        return self._reduce(values, "SUM")

    def max(self, value: float) -> float:
        """The largest of all ranks."""
        return self._reduce([value], "MAX")[0]

    def _reduce(self, values: Sequence[float], name: str) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums, getattr(dist.ReduceOp, name))
        return [float(value) for value in sums.tolist()]

    def share(self, value: Any) -> Any:
        """What the first rank holds, on every rank; for plain values."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What every rank holds, on every rank; for plain values."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that may fail on one rank, without a collective in it: all leave with the first one's error.

        Raises:
            XtokenError: another rank's, or what it said.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        errors = self.gather(None if own is None else self._told(own))
        if own is not None:
            raise own
        others = [error for error in errors if error is not None]
        if others:
            raise others[0]

    def _told(self, error: Exception) -> XtokenError:
        """What the other ranks raise."""
        if isinstance(error, XtokenError):
            return error
        return XtokenError(f"rank {self.rank} ended: {type(error).__name__}: {error}; its own output says where")

    def synchronise(self, objective: Any, now: bool) -> None:
        """Whether the next backward pass adds up gradients over ranks; only the last of a step needs to.

        FSDP does so in every pass: what is not added up it keeps whole, and a float32 gradient of the whole model on
        every rank takes the memory that sharding is to save.
        """
        if self.size > 1 and not hasattr(objective, "set_requires_gradient_sync"):
            objective.require_backward_grad_sync = now


ALONE = Ranks()


@contextmanager
def open_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, each with its own GPU if ``device`` is a GPU; one rank without torchrun.

    Raises:
        XtokenError: torchrun started more processes here than there are GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(device=device)
        return
    import torch.distributed as dist

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise XtokenError(
                f"torchrun started process {local} on a machine of {torch.cuda.device_count()} GPUs; "
                "use --nproc-per-node gpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    ranks = Ranks(rank, size, device)
    try:
        yield ranks
        ranks.wait()  # the store and the connections live in each rank: none leaves while another still uses them
    except BaseException as error:
        code = abrupt_exit(backend, error)
        if code is None:
            _leave(backend)
        else:
            atexit.register(_end, code)
        raise
    _leave(backend)


def _leave(backend: str) -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
    if backend == "gloo":
        atexit.register(_let_threads_rest)


def abrupt_exit(backend: str, error: BaseException) -> int | None:
    """The exit code with which a rank that raised is to end without leaving its group; None where it can leave.

    NCCL's peers may sit in a collective inside a kernel. To take a communicator down then can block, and torchrun ends
    the others only once a process has ended: all would wait for the half hour of their patience.
    """
    if backend != "nccl" or (isinstance(error, SystemExit) and not error.code):
        return None
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 1


def _end(code: int) -> None:
    """End at once, when Python is about to: whoever caught the error has said it by then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _let_threads_rest() -> None:
    """Wait until gloo's threads sleep, before Python ends.

    They live on after their group is destroyed, since caches of DTensor keep its mesh. One that still lets go of its
    last work needs the GIL for that, and if Python is ending by then the process aborts ("terminate called without an
    active exception"). Sleeping here gives them the GIL.
    """
    for _ in range(_LOOKS):
        time.sleep(0.01)
        if not any(_is_running(task) for task in Path("/proc/self/task").glob("*")):
            return


def _is_running(task: Path) -> bool:
    """Whether a thread of this process is one of gloo's and does not sleep."""
    try:
        name, state = task.joinpath("stat").read_text().rsplit(")", 1)
    except OSError:
        return False  # it has ended
    return "gloo" in name and state.split()[0] != "S"


def shard(objective: Any, ranks: Ranks, autocast: torch.dtype | None) -> Any:
    """FSDP2: each decoder layer, and then the rest, sharded over all ranks; masters and sums of gradients in float32.

    Their values are the first rank's; others may have an outline (``xtoken.trainer.student.outline``), and hold one
    layer whole at a time. Must come before the optimizer is built.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=autocast, reduce_dtype=torch.float32)
    for layer in decoder_layers(objective.model):
        receive(layer, ranks.device)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    receive(objective, ranks.device)
    return fully_shard(objective, mesh=mesh, mp_policy=policy)


def replicate(objective: Any, some_left_out: bool) -> Any:
    """DDP: the whole model on every rank.

    Args:
        some_left_out: look in each step which parameters got no gradient, rather than wait for one (see
            ``xtoken.trainer.student.head.leaves_some_out``).
    """
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():  # torch 2.13 has another name for it, which the first that we support lack
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            objective, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=some_left_out
        )


def gathered(tensors: Mapping[str, Tensor], keep: bool, own: bool = False) -> dict[str, Tensor]:
    """Whole tensors on the CPU, of sharded ones put together; nothing where not ``keep``. All ranks must call it.

    No two share memory, which safetensors would refuse to write.

    Args:
        own: none shares memory with what it is made of, so that the next step leaves it as it is.
    """
    members: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, one in tensors.items():
        whole = one.full_tensor() if hasattr(one, "full_tensor") else one
        if keep:
            here = whole.detach().to("cpu", copy=own and whole is one).contiguous()
            memory = here.untyped_storage().data_ptr()
            members[name] = here.clone() if memory in seen else here
            seen.add(memory)
    return members


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Put a whole tensor into one that may be sharded."""
    with torch.no_grad():
        parameter.copy_(like(parameter, whole))


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, sharded as another is."""
    if not hasattr(parameter, "device_mesh"):
        return whole.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
