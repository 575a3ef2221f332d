"""Rows from slices of the vocabulary, on one device and between processes of gloo, against rows of the whole."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.pipeline.teachers import fast_rows
from xtoken.pipeline.teachers.draws import Sampler
from xtoken.pipeline.teachers.fast_rows import difference, made_rows, open_reader, wrong_figures
from xtoken.pipeline.teachers.logit_rows import RowFigures, RowReader
from xtoken.pipeline.teachers.sliced_rows import (
    NO_KEY,
    Asked,
    Label,
    SlicedReader,
    TorchScan,
    pack,
    unpack,
)
from xtoken.schemas.errors import XtokenError

CPU = torch.device("cpu")
WIDTH, K, DRAWS = 1200, 20, 9
# slices of three processes; the last is narrower than k, and has none of the tokens that may be sampled
SLICES = (0, 500, 1190, WIDTH)
ASKED = RowReader(K, torch.arange(0, 600, 3), (0.5, 2.0), Sampler(DRAWS, 0, 1100))
DTYPES = (torch.float32, torch.bfloat16)
FIELDS = ("ids", "logprob", "target_logprob", "target_rank", "lse", "space_logprob", "tau_lognorm")


@pytest.mark.parametrize(("width", "k"), [(30, 30), (700, 5), (20_000, 64)])
def test_torch_reads_made_rows(width: int, k: int) -> None:
    assert difference(TorchScan, CPU, width, k) is None


@settings(deadline=None, max_examples=100)
@given(levels=st.integers(1, 6), width=st.integers(2, 40), seed=st.integers(0, 1000), data=st.data())
def test_a_lone_slice_gives_what_the_reader_gives(levels: int, width: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, levels, (width, width), generator=generator).float()
    uniform_N = np.random.default_rng(seed).random(width)
    asked = RowReader(k, torch.arange(0, width, 2), (0.5, 3.0), Sampler(7, 0, max(1, width - 3)))
    expected = asked.read(logits.clone(), torch.arange(width), uniform_N)
    found = SlicedReader(asked, TorchScan, width).read(logits, torch.arange(width), uniform_N)
    for name in FIELDS:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-6, err_msg=name)
    for name in ("ids", "target_rank"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.draws is not None
    assert expected.draws is not None
    same_N = found.lse == expected.lse
    if same_N.all():
        for name in ("drawn", "ids", "count"):
            np.testing.assert_array_equal(getattr(found.draws, name), getattr(expected.draws, name))
    np.testing.assert_allclose(found.draws.entropy, expected.draws.entropy, rtol=1e-5, atol=1e-6)


def test_what_was_not_asked_for_is_none() -> None:
    logits, target_N, _ = made_rows(WIDTH, torch.float32, CPU)
    found = SlicedReader(RowReader(3, torch.zeros(0, dtype=torch.int64)), TorchScan, WIDTH).read(logits, target_N)
    assert found.tau_lognorm is found.draws is None
    assert found.space_logprob is not None
    assert np.isneginf(found.space_logprob).all()


def test_logits_stay_as_they_are() -> None:
    logits, target_N, uniform_N = made_rows(WIDTH, torch.float32, CPU)
    kept = logits.clone()
    SlicedReader(ASKED, TorchScan, WIDTH).read(logits, target_N, uniform_N)
    assert torch.equal(logits, kept)


def test_ranks_follow_log_probabilities_where_logits_are_finer() -> None:
    """Logits of 1e-8 differ; less a normaliser of some nats they do not, and the lower id comes first."""
    logits = torch.tensor([[3e-8, 1e-8, 2e-8, 0.0]])
    assert len(logits.unique()) == 4
    for target in range(4):
        rows = SlicedReader(RowReader(4, torch.arange(1)), TorchScan, 4).read(logits, torch.tensor([target]))
        assert rows.ids.tolist() == [[0, 1, 2, 3]]
        assert rows.target_rank.tolist() == [target + 1]


@settings(deadline=None)
@given(st.lists(st.floats(max_value=0, width=32, allow_nan=False), min_size=1), st.integers(0, 2**31))
def test_keys_fall_as_entries_do(values: list[float], first: int) -> None:
    logprob = torch.tensor(values) + 0.0  # as differences are, without -0.0
    column = torch.arange(len(values)) + first
    key = pack(logprob, column)
    back, places = unpack(key)
    assert torch.equal(back, logprob)
    assert torch.equal(places, column)
    assert torch.equal(key.sort(descending=True).indices, logprob.sort(descending=True, stable=True).indices)
    assert bool((key > NO_KEY).all())


def test_a_slice_is_asked_for_its_own() -> None:
    asked = Asked.of(ASKED, 690, 500)
    assert (asked.k, asked.size, asked.space_P.tolist()[:2], len(asked.space_P)) == (20, 600, [1, 4], 33)
    bits = asked.space_bits.numpy().view(np.uint32)
    assert bits.shape == (22,)
    set_bits = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
    assert set_bits.tolist() == asked.space_P.tolist()
    last = Asked.of(ASKED, 10, 1190)
    assert (last.k, last.size, len(last.space_P)) == (10, 0, 0)
    every = Asked.of(RowReader(1, torch.arange(64)), 64, 0)
    assert every.space_bits.tolist() == [-1, -1]


@pytest.mark.parametrize("wrong", ["sums", "keys", "masses", "pick"])
def test_a_scan_that_errs_is_found(wrong: str) -> None:
    """One figure off by little: two entries swapped, a sum by a ten-thousandth, a sample moved by a column."""

    class Errs(TorchScan):
        def __init__(self, logits_NU: torch.Tensor, label: Label, asked: Asked) -> None:
            super().__init__(logits_NU, label, asked)
            if wrong == "sums":
                self.sums_NF[2, 1] += 1e-4

        def keys(self, lse_N: torch.Tensor) -> torch.Tensor:
            key_NK = super().keys(lse_N)
            return key_NK[:, [0, 2, 1, *range(3, key_NK.shape[1])]] if wrong == "keys" else key_NK

        def masses(self, lse_N: torch.Tensor) -> torch.Tensor:
            return super().masses(lse_N) * (1 + 1e-4 if wrong == "masses" else 1)

        def pick(self, lse_N: torch.Tensor, level_ND: torch.Tensor) -> torch.Tensor:
            return super().pick(lse_N, level_ND) + int(wrong == "pick")

    found = difference(Errs, CPU, WIDTH, 8)
    names = {"sums": "space_logprob", "keys": "ids, logprob", "masses": "draws", "pick": "draws"}
    assert found == f"{names[wrong]} of torch.float32 logits [9, {WIDTH}], k 8"


def test_without_triton_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "xtoken.pipeline.teachers.row_kernels", raising=False)
    fast_rows.agrees.cache_clear()
    assert not fast_rows.agrees(CPU)
    assert open_reader(ASKED, CPU, WIDTH) is ASKED
    fast_rows.agrees.cache_clear()


def test_kernels_that_fail_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    for kernels, why in ((broken, "RuntimeError: no such instruction"), (TorchScan, None)):
        monkeypatch.setattr(fast_rows, "_kernels", lambda kernels=kernels: kernels)
        fast_rows.agrees.cache_clear()
        assert fast_rows.agrees(CPU) == (why is None)
        assert isinstance(open_reader(ASKED, CPU, WIDTH), RowReader if why else SlicedReader)
        assert [record.message for record in caplog.records] == [
            *([f"Triton kernels are not used, torch reads the rows: {why}"] if why else [])
        ]
        caplog.clear()
    fast_rows.agrees.cache_clear()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes found."""
    folder = tmp_path_factory.mktemp("slices")
    world = len(SLICES) - 1
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank), str(world)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_processes_find_the_rows_of_the_whole_vocabulary(ranks: list[dict[str, Any]], dtype: torch.dtype) -> None:
    logits, target_N, uniform_N = made_rows(WIDTH, dtype, CPU)
    rows: RowFigures = ranks[0][str(dtype)]
    assert wrong_figures(rows, ASKED, logits, target_N, uniform_N) == []
    for rank in ranks[1:]:
        for name in FIELDS:
            assert torch.equal(getattr(rank[str(dtype)], name), getattr(rows, name)), name
        assert torch.equal(rank[str(dtype)].draws, rows.draws)
        assert torch.equal(rank[str(dtype)].entropy, rows.entropy)


def test_candidates_cross_the_wire_and_logits_do_not(ranks: list[dict[str, Any]]) -> None:
    """Of a row: k keys, five sums and two temperatures', two masses, ids of samples, the label's logit and rank."""
    logits, _, _ = made_rows(WIDTH, torch.float32, CPU)
    per_row = 8 * (K + 5 + 2 + 2 + DRAWS) + 4 + 8
    for rank in ranks:
        assert 0 < rank["bytes"] <= len(logits) * per_row
    assert per_row < 4 * WIDTH / 3, "less than the logits of a slice"


def test_all_processes_refuse_alike(ranks: list[dict[str, Any]]) -> None:
    """One that went on would wait for the others for ever."""
    for rank in ranks:
        assert "NaN or infinity" in rank["nan"]
        assert "no mass on the tokenizer's 1100 tokens" in rank["empty"]


def _refusal(reader: SlicedReader, *read: Any) -> str:
    try:
        reader.read(*read)
    except XtokenError as error:
        return str(error)
    return ""


def _as_one_of_several(folder: Path, rank: int, world: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    group, first, last = dist.group.WORLD, SLICES[rank], SLICES[rank + 1]
    reader = open_reader(ASKED, CPU, last - first, first, group)
    assert isinstance(reader, SlicedReader)
    sent: list[int] = []

    def counting(collective: Any, at: int) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            sent.append(values[at].numel() * values[at].element_size())
            return collective(*values, **named)

        return call

    dist.all_gather, dist.all_reduce = counting(dist.all_gather, 1), counting(dist.all_reduce, 0)
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        logits, target_N, uniform_N = made_rows(WIDTH, dtype, CPU)
        sent.clear()
        found[str(dtype)] = reader.figures(logits[:, first:last].contiguous(), target_N, uniform_N)
        found["bytes"] = sum(sent)
    logits[0, SLICES[1]] = torch.nan  # a column of one process alone
    found["nan"] = _refusal(reader, logits[:, first:last], target_N, uniform_N)
    logits[0] = torch.where(torch.arange(WIDTH) < 1100, -torch.inf, 1.0)
    found["empty"] = _refusal(reader, logits[:, first:last], target_N, uniform_N)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _as_one_of_several(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
