"""Checkpoints survive damage and full disks, and restore every bit."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.checkpoint as checkpoint
from schemas.errors import VerificationError, XtokenError
from trainer.checkpoint import restore_checkpoint, save_checkpoint


class Net(torch.nn.Module):
    """Tied weights, a vector, a persistent and a passing buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def trained(steps: int, model: Net | None = None, optimizer: Any = None) -> tuple[Net, Any]:
    if model is None:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randint(0, 5, (4,))) - 1).square().sum().backward()
        optimizer.step()
    return model, optimizer


def fresh() -> tuple[Net, Any]:
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def test_restored_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Weights, AdamW's moments and the random state: three more steps on random ids end in the same bits."""
    model, optimizer = trained(4)
    save_checkpoint(tmp_path, 4, model, optimizer, [], {"position": {"epoch": 1, "taken": 2}}, keep=1)
    trained(3, model, optimizer)
    again, again_optimizer = fresh()
    restored = restore_checkpoint(tmp_path, again, again_optimizer, [])
    assert restored is not None
    assert (restored.step, restored.state) == (4, {"position": {"epoch": 1, "taken": 2}})
    trained(3, again, again_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for step in (5, 10, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, [], {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    restored = restore_checkpoint(tmp_path, *fresh(), [])
    assert restored is not None
    assert restored.step == 1_000_000


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = trained(1)
    save_checkpoint(tmp_path, 1, model, optimizer, [], {"tokens": 11}, keep=5)
    save_checkpoint(tmp_path, 2, model, optimizer, [], {"tokens": 22}, keep=5)
    path = tmp_path / "step-000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if damage == "remove" else path.write_bytes(data if damage == "flip" else data[:-9])
    restored = restore_checkpoint(tmp_path, *fresh(), [])
    assert restored is not None
    assert (restored.step, restored.state) == (1, {"tokens": 11})
    assert "step-000002" in restored.damaged[0]
    save_checkpoint(tmp_path, 3, model, optimizer, [], {}, keep=2)
    assert (tmp_path / "step-000001").exists(), "a damaged one does not count among those kept"


def test_only_damaged_checkpoints_stop_the_run(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save_checkpoint(tmp_path, 1, model, optimizer, [], {}, keep=1)
    (tmp_path / "step-000001" / "state.json").write_text("[]")
    with pytest.raises(VerificationError, match="every checkpoint is damaged"):
        restore_checkpoint(tmp_path, *fresh(), [])


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(1)
    save_checkpoint(tmp_path, 1, model, optimizer, [], {}, keep=1)
    write, calls = checkpoint.save_file, []

    def refuse_second(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(checkpoint, "save_file", refuse_second)
    with pytest.raises(XtokenError, match="No space left"):
        save_checkpoint(tmp_path, 2, model, optimizer, [], {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert restore_checkpoint(tmp_path, *fresh(), []) is not None


def refuse(folder: Path) -> None:
    raise VerificationError(f"{folder}: bits fell")


def test_what_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(1)
    save_checkpoint(tmp_path, 1, model, optimizer, [], {}, keep=1)
    monkeypatch.setattr(checkpoint, "_verify", refuse)
    with pytest.raises(XtokenError, match="bits fell"):
        save_checkpoint(tmp_path, 2, model, optimizer, [], {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert restore_checkpoint(tmp_path, *fresh(), []) is None


def test_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, *trained(1), [], {}, keep=1)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(XtokenError, match="another model"):
        restore_checkpoint(tmp_path, other, torch.optim.AdamW(other.parameters()), [])
