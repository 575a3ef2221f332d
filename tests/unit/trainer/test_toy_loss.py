"""A loss is one file and an entry of the schema: a file of the tests is added, and a student is trained with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xtoken.schemas.losses import LOSSES, About, LossSchema
from xtoken.trainer import losses
from xtoken.trainer.data.batches import Loader, StepBatch
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.mixing import Mixing
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.ranks import Ranks
from xtoken.trainer.step import count_step, run_step
from xtoken.trainer.student.model import load_student

TOY = LossSchema("toy_loss", about=About("squared distance of chunk likelihoods", "one number per chunk", "never"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, pair: Any) -> Loss:
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(Path(__file__).parent)])
    monkeypatch.setitem(LOSSES, "toy", TOY)
    return open_loss("toy", pair.setup())


def by_hand(student: Student, batch: StepBatch) -> float:
    """The mean over chunks, from the targets as they are stored and the model's own logits."""
    total = 0.0
    for micro in batch.micros:
        ids, positions = torch.from_numpy(micro.input_BL), torch.from_numpy(micro.position_BL)
        with torch.no_grad():
            logits = student.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        logp = logits.flatten(0, 1)[torch.from_numpy(micro.place_P)][:, : student.vocabulary].log_softmax(-1)
        label_P = logp[torch.arange(len(micro.label_P)), torch.from_numpy(micro.label_P)].numpy()
        (targets,) = micro.targets
        for first, length, l_T in zip(
            targets.first_C, targets.length_C, targets.columns["teacher_logprob"], strict=True
        ):
            total += (float(l_T) - label_P[first : first + length].sum()) ** 2
    return total / batch.chunks[0]


def test_one_file_and_one_line_train_a_student(make_targets: Callable[..., str], student_dir: str, toy: Loss) -> None:
    targets = Targets(make_targets([[9, 12, 5, 7], [6, 8]], losses=("p-kl",)))
    model = load_student(student_dir, torch.device("cpu"), False).double()
    student = Student(model, torch.device("cpu"), None, 24)
    layout = Layout(0, 32, 24, (toy,))
    with Loader(Sources([targets]), layout, step_tokens=200, micro_tokens=20, seed=0) as loader:
        batch = loader.step()
    assert batch.chunks[0] > 10
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        expected = by_hand(student, batch)
        figures = run_step(Objective(student, [toy]), batch, count_step(batch, Ranks()), Mixing("fixed", 1, 0), Ranks())
        assert figures.loss == figures.kd == pytest.approx(expected, rel=1e-6)
        values.append(expected)
        optimizer.step()
    assert values[0] > values[1] > values[2]
    assert np.isfinite(values).all()
