"""Rows of several samples: how full they are, and that a sample is the same in them as alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import Micro, split_micros
from xtoken.trainer.data.packing import Shape, packed_shapes, padded_shapes
from xtoken.trainer.data.samples import Sample, read_samples
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses.base import Loss, View
from xtoken.trainer.ragged import Columns, running


class Reads(Loss):
    """A loss that says which columns it reads."""

    def __init__(self, name: str) -> None:
        self.columns = Columns.of(name)  # type: ignore[misc]

    def valid(self, start_C: Any, arrays: Any) -> Any:
        """All chunks of byte-prefix, otherwise those with entries."""
        return super().valid(start_C, arrays) if "pkl_count" in arrays else start_C >= 0

    def terms(self, view: View) -> Any:
        raise NotImplementedError


def skewed(samples: int, seed: int) -> list[int]:
    """Log-normal lengths, 8 to 1024."""
    found = np.random.default_rng(seed).lognormal(4.6, 1.0, samples)
    return np.clip(found, 8, 1024).astype(int).tolist()


def waste(sizes: list[int], shapes: list[Shape]) -> float:
    return 1 - sum(sizes) / sum(len(shape.rows) * shape.width for shape in shapes)


@pytest.mark.parametrize(("step_tokens", "micro_tokens"), [(16_384, 2048), (32_768, 8192), (262_144, 16_384)])
def test_little_is_wasted_on_skewed_lengths(step_tokens: int, micro_tokens: int, figure: Callable[[str], None]) -> None:
    lengths = skewed(20_000, 1)
    steps = np.searchsorted(running(np.array(lengths)), np.arange(step_tokens, sum(lengths), step_tokens))
    packed, padded = [], []
    for low, high in list(zip(steps[:-1].tolist(), steps[1:].tolist(), strict=True))[:16]:
        sizes = lengths[low:high]
        packed.append(waste(sizes, packed_shapes(sizes, micro_tokens, 1024)))
        padded.append(waste(sizes, padded_shapes(sizes, micro_tokens)))
    figure(
        f"padding, log-normal lengths, steps of {step_tokens:,} tokens, passes of {micro_tokens:,}: "
        f"packed {np.mean(packed):.2%} (worst step {max(packed):.2%}), sorted by length {np.mean(padded):.2%}"
    )
    assert np.mean(packed) < 0.05


@pytest.mark.parametrize("seed", range(6))
def test_every_sample_once_and_nothing_too_large(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, micro_tokens = skewed(int(rng.integers(1, 300)), seed), int(rng.integers(64, 4096))
    for shapes in (packed_shapes(sizes, micro_tokens, 512), padded_shapes(sizes, micro_tokens)):
        assert sorted(sample for shape in shapes for row in shape.rows for sample in row) == list(range(len(sizes)))
        for shape in shapes:
            used = [sum(sizes[sample] for sample in row) for row in shape.rows]
            assert shape.width == max(used)
            assert len(used) == 1 or len(used) * shape.width <= micro_tokens
            for row, width in zip(shape.rows, used, strict=True):
                assert width <= max(min(512, micro_tokens), *(sizes[sample] for sample in row), max(sizes))
    assert packed_shapes(sizes, micro_tokens, 512) == packed_shapes(sizes, micro_tokens, 512)


def test_known_rows() -> None:
    """First-fit decreasing by hand, and rows made as wide as each other where that costs no row more."""
    (shape,) = packed_shapes([2, 5, 3, 6], 100, 8)
    assert shape == Shape([[3, 0], [1, 2]], 8)
    (even,) = packed_shapes([4, 4, 4, 4], 100, 14)
    assert (even.width, [sorted(row) for row in even.rows]) == (8, [[0, 1], [2, 3]])
    assert packed_shapes([], 8, 8) == []
    assert packed_shapes([20], 8, 8) == [Shape([[0]], 20)]


def by_sample(micros: list[Micro]) -> dict[str, list[Any]]:
    """What each sample predicts from what, and its targets, counted from its own first position."""
    found = {}
    for micro in micros:
        for at, name in enumerate(micro.sample_ids):
            here = np.flatnonzero(micro.sample_P == at)
            place = micro.place_P[here]
            lists = [micro.input_BL.flat[place], micro.position_BL.flat[place], micro.label_P[here]]
            assert (np.diff(place) == 1).all()
            for targets in micro.targets:
                low, high = int(here[0]), int(here[-1]) + 1
                mine = targets.sample_C == at
                first, last = targets.chunks(low, high)
                assert np.flatnonzero(mine).tolist() == list(range(first, last))
                next_C = targets.next_C[mine]
                lists += [targets.first_C[mine] - low, targets.length_C[mine], np.where(next_C < 0, -1, next_C - low)]
                lists += [
                    targets.weight_B[[at]],
                    *(array for _, array in sorted(targets.slice(low, high).columns.items())),
                ]
            found[name] = [array.tolist() for array in lists]
    return found


@pytest.fixture
def samples(make_targets: Callable[..., str]) -> tuple[list[Sample], Layout]:
    lengths = [[9, 12, 5, 7, 11, 6, 8, 10, 13, 4, 9, 9, 3, 7, 2, 1]]
    targets = Targets(make_targets(lengths, losses=("p-kl", "byte-prefix")))
    layout = Layout(0, 16, 24, (Reads("p-kl"), Reads("byte-prefix")), (3.0, 1.0))
    names = (*layout.columns(0), *layout.columns(1))
    groups = [targets.read(ref, tuple(dict.fromkeys(names))) for ref in targets.groups]
    stored = [[(group, row), (group, row)] for group in groups for row in range(len(group.sample_ids))]
    stored[5][1] = None  # type: ignore[call-overload]
    return read_samples(stored, layout), layout


@pytest.mark.parametrize("micro_tokens", [16, 40, 1000])
def test_a_sample_is_the_same_packed_and_padded(samples: tuple[list[Sample], Layout], micro_tokens: int) -> None:
    found, layout = samples
    padded = by_sample(split_micros(found, micro_tokens, layout.losses))
    packed_micros = split_micros(found, micro_tokens, layout.losses, 16)
    assert any(len(micro.sample_ids) > len(micro.input_BL) for micro in packed_micros)
    assert by_sample(packed_micros) == padded
    assert len(padded) == len(found)


@pytest.mark.parametrize("pack_tokens", [None, 16])
def test_positions_start_again_at_each_sample_and_at_the_filling(
    samples: tuple[list[Sample], Layout], pack_tokens: int | None
) -> None:
    found, layout = samples
    for micro in split_micros(found, 40, layout.losses, pack_tokens):
        filled = np.zeros(micro.input_BL.size, bool)
        filled[micro.place_P] = True
        filled = filled.reshape(micro.input_BL.shape)
        sizes = np.bincount(micro.sample_P)
        for row in range(len(filled)):
            used = int(filled[row].sum())
            assert filled[row, :used].all()
            starts = np.flatnonzero(micro.position_BL[row] == 0).tolist()
            mine = np.unique(micro.sample_P[micro.place_P // filled.shape[1] == row])
            expected = [0, *np.cumsum(sizes[mine]).tolist()]
            assert starts == [start for start in expected if start < filled.shape[1]]
            jumps = np.diff(micro.position_BL[row])
            assert (jumps[[at for at in range(len(jumps)) if at + 1 not in starts]] == 1).all()
            assert (micro.input_BL[row, used:] == 0).all()


def test_a_slice_is_what_counting_gives(samples: tuple[list[Sample], Layout]) -> None:
    found, layout = samples
    (micro,) = split_micros(found, 10_000, layout.losses, 16)
    for targets in micro.targets:
        for low, high in [(0, 7), (3, 30), (20, len(micro.label_P))]:
            first, last = targets.chunks(low, high)
            picked = targets.slice(low, high).columns
            for count_name, names in targets.spec.entries.items():
                begin, end = (first, last) if count_name in targets.spec.chunk else (low, high)
                count = targets.columns[count_name]
                for name in names:
                    expected = targets.columns[name][count[:begin].sum() : count[:end].sum()]
                    np.testing.assert_array_equal(picked[name], expected)
                np.testing.assert_array_equal(picked[count_name], count[begin:end])
