"""Several target folders: joined by sample, each sample once, weights over the teachers that hold it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.plan import Position
from xtoken.trainer.data.samples import sample_weights
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses.base import Loss, View
from xtoken.trainer.ragged import Columns

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10]]


class Reads(Loss):
    """A loss of P-KL's columns."""

    columns = Columns.of("p-kl")

    def terms(self, view: View) -> Any:
        raise NotImplementedError


def layout(**options: Any) -> Layout:
    return Layout(0, 32, 24, (Reads(), Reads()), **({"weights": (1.0, 1.0)} | options))


def keep(root: str, part: int, rows: list[int]) -> None:
    """Leave only these rows in a part, and say so in its manifest."""
    path = Path(root) / "data" / f"part-0000{part}.parquet"
    table = pq.read_table(path).take(pa.array(rows))
    pq.write_table(table, path, row_group_size=2)
    manifest = Path(root) / "manifest.json"
    before, after = (f'"index":{part},"samples":{n}' for n in (len(LENGTHS[part]), len(rows)))
    text = manifest.read_text()
    assert before in text
    manifest.write_text(text.replace(before, after))


@pytest.fixture
def two(make_targets: Callable[..., str]) -> list[str]:
    """The second folder lacks one sample of part 0, holds the others in another order, and lacks part 1's last."""
    first, second = make_targets(LENGTHS), make_targets(LENGTHS, name="second")
    keep(second, 0, [4, 2, 0, 3])
    keep(second, 1, [1, 0])
    keep(first, 1, [0, 1, 2])
    return [first, second]


def sources(roots: list[str]) -> Sources:
    return Sources([Targets(root) for root in roots])


def test_joined_samples_are_the_same_text(two: list[str]) -> None:
    found = sources(two)
    assert (found.samples, found.held, found.shared) == (8, [8, 6], 6)
    seen = []
    for group in found.groups:
        for stored in found.read(group, layout()):
            names = {one[0].sample_ids[one[1]] for one in stored if one is not None}
            assert len(names) == 1
            seen.append((names.pop(), [one is not None for one in stored]))
    assert len(seen) == len({name for name, _ in seen}) == 8
    assert {name for name, held in seen if not held[1]} == {"doc0#1", "doc1#2"}


def test_a_sample_of_the_second_folder_only_comes_once_too(two: list[str]) -> None:
    found = sources(two[::-1])
    assert (found.samples, found.held, found.shared) == (8, [6, 8], 6)
    only_second = [
        stored[1][0].sample_ids[stored[1][1]]
        for group in found.groups
        for stored in found.read(group, layout())
        if stored[0] is None and stored[1] is not None
    ]
    assert sorted(only_second) == ["doc0#1", "doc1#2"]


def test_the_same_id_with_other_tokens_is_another_sample(make_targets: Callable[..., str]) -> None:
    """Windows cut for another teacher carry the same names."""
    found = sources([make_targets([[9, 12]]), make_targets([[9, 12]], name="second", seed=1)])
    assert (found.samples, found.held, found.shared) == (4, [2, 2], 0)


def loader(roots: list[str], position: Position = Position(), step_tokens: int = 20) -> Loader:  # noqa: B008 - frozen
    return Loader(sources(roots), layout(), step_tokens=step_tokens, micro_tokens=16, seed=3, positions=(position,))


def test_every_sample_once_an_epoch_and_resume(two: list[str]) -> None:
    one_by_one = loader(two, step_tokens=1)
    first_epoch = [name for _ in range(8) for name in one_by_one.step().sample_ids]
    assert sorted(first_epoch) == [*(f"doc0#{i}" for i in range(5)), *(f"doc1#{i}" for i in range(3))]
    whole = loader(two)
    steps = [whole.step() for _ in range(14)]
    assert steps[-1].positions[0].epoch >= 1
    for done in range(14):
        again = loader(two, steps[done - 1].positions[0] if done else Position())
        assert again.step().sample_ids == steps[done].sample_ids


def test_counts_and_weights_of_a_step(two: list[str]) -> None:
    found = Loader(sources(two), layout(weights=(3.0, 1.0)), step_tokens=1000, micro_tokens=1000, seed=0).step()
    assert found.held == (8, 6)
    (micro,) = found.micros
    assert found.chunks == tuple(len(targets.first_C) for targets in micro.targets)
    assert found.chunks[0] > found.chunks[1] > 0
    partial = [micro.sample_ids.index(name) for name in ("doc0#1", "doc1#2")]
    for row in range(8):
        expected = (1.0, 0.0) if row in partial else (0.75, 0.25)
        assert tuple(targets.weight_B[row] for targets in micro.targets) == expected
    assert set(micro.targets[1].sample_C.tolist()).isdisjoint(partial)


@pytest.mark.parametrize("weighting", ["ce", "entropy", "confidence"])
def test_weighting_follows_what_is_stored(two: list[str], weighting: str) -> None:
    """Against a softmax made by hand from the columns."""
    found = sources(two)
    shape = layout(weighting=weighting)
    from xtoken.trainer.data.samples import read_sample

    compared = 0
    for group in found.groups:
        for stored in found.read(group, shape):
            sample = read_sample(stored, shape)
            scores = [by_hand(*one, weighting) for one in stored if one is not None]
            expected = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose([w for w, one in zip(sample.weights, stored, strict=True) if one], expected)
            compared += len(scores) == 2
    assert compared == 6


def by_hand(group: Any, row: int, weighting: str) -> float:
    if weighting == "entropy":
        return -float(group.values("teacher_entropy", row)[0])
    if weighting == "confidence":
        return float(group.values("teacher_top1", row)[0])
    logprob, ends = group.values("teacher_logprob", row), group.values("chunk_student_end", row)
    return float(logprob[:-1].astype(float).sum() / ends[-2])  # the last chunk has no row


def test_sample_weights_by_hand() -> None:
    assert sample_weights((1.0, 3.0), (0.0, 0.0), "static") == (0.25, 0.75)
    assert sample_weights((1.0, 3.0), (0.0, None), "static") == (1.0, 0.0)
    assert sample_weights((0.0, 1.0), (0.0, None), "static") == (0.0, 0.0), "the one that holds it weighs nothing"
    assert sample_weights((1.0, 1.0), (np.log(3.0), 0.0), "ce") == pytest.approx((0.75, 0.25))
    assert sample_weights((1.0, 1.0), (-2000.0, -2001.0), "ce")[0] == pytest.approx(1 / (1 + np.exp(-1)))
    assert sample_weights((1.0, 1.0), (float("nan"), -5.0), "entropy") == (0.0, 1.0)
    assert sample_weights((1.0, 1.0), (float("nan"), None), "entropy") == (1.0, 0.0)
