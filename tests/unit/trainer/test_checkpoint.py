"""Checkpoints survive damage, kills and full disks, and restore every bit."""

import errno
import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import xtoken.trainer.checkpoint as checkpoint
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.trainer.checkpoint import Policy, refuse_dtypes, restore_checkpoint, save_checkpoint

ONE = Policy(1)
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
Groups = dict[str, dict[str, Tensor]]


def trained(steps: int, model: Any = None, optimizer: Any = None) -> tuple[Any, Any]:
    """A model and its AdamW after ``steps`` more steps."""
    if model is None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.arange(4)) - 1).square().sum().backward()
        optimizer.step()
    return model, optimizer


def groups(model: Any, optimizer: Any) -> Groups:
    state = optimizer.state_dict()["state"]
    return {
        "model": model.state_dict(),
        "optimizer": {f"{key}:{i}": value for i, values in state.items() for key, value in values.items()},
    }


def some(step: int = 0) -> Groups:
    """Tensors that tell the step they belong to."""
    return {"model": {"a": torch.full((40,), float(step))}, "optimizer": {"b": torch.full((800,), float(step))}}


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_restored_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Weights and AdamW's moments: three more steps end in the same bits."""
    model, optimizer = trained(4)
    state = {"position": [{"epoch": 1, "taken": 2}], "seconds": 0.1 + 0.2}
    save_checkpoint(tmp_path, 4, groups(model, optimizer), state, ONE)
    trained(3, model, optimizer)
    restored = restore_checkpoint(tmp_path)
    assert restored is not None
    assert (restored.step, restored.state, restored.damaged) == (4, state, [])
    again, again_optimizer = trained(1)
    again.load_state_dict(restored.tensors("model", like=groups(again, again_optimizer)["model"]))
    stored = restored.tensors("optimizer")
    for i, parameter in enumerate(again.parameters()):
        again_optimizer.state[parameter] = {
            key: stored[f"{key}:{i}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
        }
    trained(3, again, again_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    """All dtypes and shapes, and views that do not lie in one piece, as the library for the format reads them."""
    torch.manual_seed(1)
    plain = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in checkpoint._DTYPES}
    shapes = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "odd": torch.ones(3, dtype=torch.bool)}
    views = {"transposed": torch.randn(4, 6).T, "strided": torch.arange(9)[::2], "expanded": torch.ones(1).expand(7)}
    learned = {"learned": torch.nn.Parameter(torch.tensor([math.nan, math.inf, -0.0]))}
    members = plain | shapes | views | learned
    save_checkpoint(tmp_path, 1, {"model": members, "optimizer": {}}, {}, ONE)
    restored = restore_checkpoint(tmp_path)
    assert restored is not None
    found = restored.tensors("model", like=members)
    for name, value in members.items():
        bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (value, found[name])]
        assert torch.equal(*bits), name
        assert found[name].data_ptr() % found[name].element_size() == 0, name
    assert restored.tensors("optimizer") == {}


def test_a_tensor_that_no_checkpoint_holds_is_refused() -> None:
    refuse_dtypes({"weight": torch.zeros(2), "turn": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(XtokenError, match=r"turn of the student is torch\.complex128, which safetensors cannot hold"):
        refuse_dtypes({"weight": torch.zeros(2), "turn": torch.zeros(2, dtype=torch.complex128)})


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, some(step), {}, Policy(2))
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    restored = restore_checkpoint(tmp_path)
    assert restored is not None
    assert restored.step == 1_000_000


def test_multiples_stay_for_good(tmp_path: Path) -> None:
    for step in range(5, 65, 5):
        save_checkpoint(tmp_path, step, some(step), {}, Policy(2, keep_every=20))
    assert names(tmp_path) == [f"step-0000{step}" for step in (20, 40, 55, 60)]


def test_a_step_saved_twice_is_the_second(tmp_path: Path) -> None:
    for value in (1, 2):
        save_checkpoint(tmp_path, 5, some(value), {"value": value}, ONE)
    restored = restore_checkpoint(tmp_path)
    assert restored is not None
    assert restored.state == {"value": 2}
    assert restored.tensors("model")["a"][0] == 2
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    save_checkpoint(tmp_path, 1, some(), {"tokens": 11}, Policy(5))
    save_checkpoint(tmp_path, 2, some(), {"tokens": 22}, Policy(5))
    path = tmp_path / "step-000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if damage == "remove" else path.write_bytes(data if damage == "flip" else data[:-9])
    restored = restore_checkpoint(tmp_path)
    assert restored is not None
    assert (restored.step, restored.state) == (1, {"tokens": 11})
    assert "step-000002" in restored.damaged[0]
    save_checkpoint(tmp_path, 3, some(), {}, Policy(2))
    assert names(tmp_path) == ["damaged-step-000002", "step-000001", "step-000003"], "a damaged one does not count"


def test_only_damaged_checkpoints_stop_the_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, some(), {}, ONE)
    (tmp_path / "step-000001" / "state.json").write_text("[]")
    with pytest.raises(VerificationError, match="every checkpoint is damaged"):
        restore_checkpoint(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    """As the first ones wrote it: three files, no format."""
    save_checkpoint(tmp_path, 1, {**some(), "rng": {"cpu": torch.get_rng_state()}}, {}, ONE)
    path = tmp_path / "step-000001" / "state.json"
    record = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("format", "digest")}
    path.write_text(json.dumps(record | {"digest": checkpoint.digest(record)}))
    with pytest.raises(XtokenError, match=r"another version of xtoken.*use another --out") as caught:
        restore_checkpoint(tmp_path)
    assert not isinstance(caught.value, VerificationError)
    assert names(tmp_path) == ["step-000001"], "it is not damaged, and stays for the version that reads it"


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert restore_checkpoint(tmp_path) is None
    assert restore_checkpoint(tmp_path / "nowhere", before=7) is None


@pytest.mark.parametrize(
    "other",
    [{}, {"a": torch.zeros(41)}, {"a": torch.zeros(40), "more": torch.zeros(1)}, {"a": torch.zeros(40).bfloat16()}],
    ids=["fewer", "shape", "more", "dtype"],
)
def test_another_model_is_refused(tmp_path: Path, other: dict[str, Tensor]) -> None:
    save_checkpoint(tmp_path, 1, some(), {}, ONE)
    restored = restore_checkpoint(tmp_path)
    assert restored is not None
    assert restored.tensors("model", like=some()["model"]).keys() == {"a"}
    with pytest.raises(XtokenError, match="another model"):
        restored.tensors("model", like=other)


class TestGoingBack:
    """``before``: what a rollback asks for."""

    def test_the_newest_before_a_step(self, tmp_path: Path) -> None:
        for step in (10, 20, 30):
            save_checkpoint(tmp_path, step, some(step), {}, Policy(5))
        restored = restore_checkpoint(tmp_path, before=31)
        assert restored is not None
        assert (restored.step, len(names(tmp_path))) == (30, 3)
        restored = restore_checkpoint(tmp_path, before=30)
        assert restored is not None
        assert restored.step == 20
        assert restored.tensors("model")["a"][0] == 20
        assert names(tmp_path) == ["step-000010", "step-000020"], "what the run turned away from is gone"

    def test_a_damaged_one_is_passed_over(self, tmp_path: Path) -> None:
        for step in (10, 20, 30):
            save_checkpoint(tmp_path, step, some(step), {}, Policy(5))
        (tmp_path / "step-000020" / "state.json").unlink()
        restored = restore_checkpoint(tmp_path, before=30)
        assert restored is not None
        assert (restored.step, len(restored.damaged)) == (10, 1)

    def test_to_the_beginning(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, 10, some(), {}, ONE)
        assert restore_checkpoint(tmp_path, before=10) is None
        assert names(tmp_path) == []

    def test_nothing_is_deleted_where_nothing_whole_is_left(self, tmp_path: Path) -> None:
        for step in (10, 20):
            save_checkpoint(tmp_path, step, some(step), {}, Policy(5))
        (tmp_path / "step-000010" / "state.json").unlink()
        with pytest.raises(VerificationError):
            restore_checkpoint(tmp_path, before=20)
        assert names(tmp_path) == ["step-000010", "step-000020"]


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """``limit(n)``: no file of this process may grow beyond ``n`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_disk_that_takes_a_part_of_a_file(
    tmp_path: Path, limit: Callable[[int], None], file: str, share: float
) -> None:
    """The kernel itself refuses, in the middle of each file: the one that exceeds the limit is made the largest."""
    save_checkpoint(tmp_path, 1, some(1), {"step": 1}, ONE)
    large, state = some(2), {"pad": "x" * (60_000 if file == "state.json" else 0)}
    for group in large:
        if file.startswith(group):
            large[group]["large"] = torch.zeros(15_000)
    limit(max(8000, int(share * 60_000)))
    with pytest.raises(XtokenError, match=r"File too large.*earlier checkpoints stay, make room"):
        save_checkpoint(tmp_path, 2, large, state, ONE)
    assert names(tmp_path) == ["step-000001"]
    limit(10**9)
    restored = restore_checkpoint(tmp_path)
    assert restored is not None
    assert (restored.state, restored.tensors("model")["a"][0]) == ({"step": 1}, 1)
    save_checkpoint(tmp_path, 2, large, state, ONE)
    assert names(tmp_path) == ["step-000002"]


class Killed(BaseException):
    """No handler of the code catches it, as none catches kill -9."""


class Faulty:
    """Calls of ``os`` that change the disk; at the n-th, before it is made, ``error`` is raised."""

    CALLS = ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "open"), (os, "unlink"), (os, "rmdir"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.at, self.error, self.count, self.on = at, error, 0, True
        for module, name in self.CALLS:
            monkeypatch.setattr(module, name, self._wrap(getattr(module, name)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += self.on
            if self.on and self.count == self.at:
                self.on = False
                raise self.error
            return real(*args, **kwargs)

        return call


def calls_of_a_save(folder: Path) -> int:
    """How many such calls one save makes."""
    with pytest.MonkeyPatch.context() as patch:
        save_checkpoint(folder, 1, some(1), {}, ONE)
        faulty = Faulty(patch, 0, Killed())
        save_checkpoint(folder, 2, some(2), {}, ONE)
        return faulty.count


@pytest.mark.parametrize("twice", [False, True], ids=["a-new-step", "the-same-step"])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path, twice: bool) -> None:
    """Stopped before each call that changes the disk, in turn: what restores is the old one or the new one, whole."""
    calls, outcomes = calls_of_a_save(tmp_path / "count"), []
    assert calls > 8
    for at in range(1, calls + 4):
        root = tmp_path / str(at)
        save_checkpoint(root, 2 if twice else 1, some(1), {"value": 1}, ONE)
        with pytest.MonkeyPatch.context() as patch:
            faulty = Faulty(patch, at, Killed())
            try:
                save_checkpoint(root, 2, some(2), {"value": 2}, ONE)
            except Killed:
                outcomes.append(at)
            faulty.on = False
        restored = restore_checkpoint(root)
        assert restored is not None
        value = restored.state["value"]
        assert restored.tensors("model")["a"][0] == restored.tensors("optimizer")["b"][0] == value
        assert restored.damaged == []
        assert not list(root.glob(".*")), "leftovers are cleaned"
        save_checkpoint(root, 3, some(3), {}, ONE)
        assert names(root) == ["step-000003"]
    assert len(outcomes) >= calls - 1, "the calls were reached"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_call_says_so(tmp_path: Path, code: int) -> None:
    """fsync and rename can find out last that there is no room; deleting old ones afterwards may fail, too."""
    calls, caught = calls_of_a_save(tmp_path / "count"), list[Exception]()
    for at in range(1, calls + 1):
        root = tmp_path / str(at)
        save_checkpoint(root, 1, some(1), {"value": 1}, ONE)
        with pytest.MonkeyPatch.context() as patch:
            Faulty(patch, at, OSError(code, os.strerror(code)))
            try:
                save_checkpoint(root, 2, some(2), {"value": 2}, ONE)
            except (XtokenError, OSError) as error:
                caught.append(error)
        if caught and isinstance(caught[-1], OSError):
            assert (root / "step-000002").exists(), "only deleting what is old comes later"
        restored = restore_checkpoint(root)
        assert restored is not None
        assert restored.tensors("model")["a"][0] == restored.state["value"]
    assert sum(isinstance(error, XtokenError) for error in caught) > calls / 2
    assert all(os.strerror(code) in str(error) for error in caught)


def test_what_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk keeps other bytes than it was given: they are compared with what was meant, not with themselves."""
    save_checkpoint(tmp_path, 1, some(), {}, ONE)
    real = checkpoint._sync

    def rot(folder: Path) -> None:
        if folder.name.endswith(".tmp"):
            with open(folder / FILES[0], "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x01")
        real(folder)

    monkeypatch.setattr(checkpoint, "_sync", rot)
    with pytest.raises(XtokenError, match=r"model\.safetensors does not have its recorded sha256.*earlier"):
        save_checkpoint(tmp_path, 2, some(), {}, ONE)
    assert names(tmp_path) == ["step-000001"]


def test_other_tools_read_the_files(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, some(3), {}, ONE)
    assert torch.equal(load_file(tmp_path / "step-000001" / "model.safetensors")["a"], some(3)["model"]["a"])
