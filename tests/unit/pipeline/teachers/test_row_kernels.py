"""Triton kernels against torch, by Triton's interpreter on a CPU, and compiled for GPUs that need not be there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "triton is not installed, since vLLM takes another runner beside it; make kernels runs these tests in an "
        "environment of their own",
        allow_module_level=True,
    )
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter could not be used: TRITON_INTERPRET is not 1", allow_module_level=True)

from xtoken import cli
from xtoken.pipeline.teachers import fast_rows
from xtoken.pipeline.teachers.draws import Sampler
from xtoken.pipeline.teachers.fast_rows import agrees, difference, made_rows, open_reader
from xtoken.pipeline.teachers.logit_rows import RowReader
from xtoken.pipeline.teachers.row_kernels import KernelScan
from xtoken.pipeline.teachers.sliced_rows import ABOVE, BEFORE, BELOW, Asked, Label, SlicedReader, TorchScan
from xtoken.schemas.errors import XtokenError

CPU = torch.device("cpu")
FIELDS = ("ids", "logprob", "target_logprob", "target_rank", "lse", "space_logprob", "tau_lognorm")


@pytest.mark.parametrize(("width", "k", "tile"), [(700, 5, 64), (2501, 9, 128), (3001, 2, 512)])
def test_kernels_read_made_rows(width: int, k: int, tile: int) -> None:
    logits, target_N, _ = made_rows(width, torch.float32, CPU)
    asked = Asked.of(RowReader(k, torch.arange(3)), width, 0)
    scan = KernelScan(logits[:1], Label(target_N[:1], torch.zeros(1)), asked)
    assert scan.tile == tile
    assert difference(KernelScan, CPU, width, k) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_readers(dtype: torch.dtype) -> None:
    width, count = 900, 4
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(count, width, generator=generator) * 3).to(dtype)
    target_N = torch.randint(0, width, (count,), generator=generator)
    uniform_N = np.random.default_rng(5).random(count)
    asked = RowReader(12, torch.arange(0, width, 7), (0.5, 2.0), Sampler(6, 0, 850))
    expected = asked.read(logits.float().clone(), target_N, uniform_N)
    found = SlicedReader(asked, KernelScan, width).read(logits, target_N, uniform_N)
    assert expected.lse is not None
    np.testing.assert_array_max_ulp(found.lse, expected.lse, 1)
    for name in FIELDS:
        one, other = getattr(found, name), getattr(expected, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-6, err_msg=name)
    for name in ("ids", "target_rank"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.draws is not None
    assert expected.draws is not None
    for name in ("drawn", "ids", "count"):
        np.testing.assert_array_equal(getattr(found.draws, name), getattr(expected.draws, name))


def test_a_slice_is_read_as_torch_reads_it() -> None:
    """The label in the slice, before it and behind it; fewer columns than k; the end of what may be sampled inside."""
    logits, _, _ = made_rows(600, torch.float32, CPU)
    logits = logits[:3]
    column_N, logit_N = torch.tensor([250, -40, 900]), torch.tensor([float(logits[0, 250]), 2.0, -1.0])
    for width, k, size in ((600, 4, 333), (10, 30, 0)):
        part = logits[:, 100 : 100 + width] if width < 500 else logits
        asked = Asked.of(RowReader(k, torch.arange(0, 600, 5), (3.0,), Sampler(1, 0, size)), width, 0)
        one, other = (scan(part, Label(column_N, logit_N), asked) for scan in (KernelScan, TorchScan))
        torch.testing.assert_close(one.sums_NF, other.sums_NF, rtol=1e-6, atol=1e-6)
        for column in (BEFORE, ABOVE, BELOW):
            assert torch.equal(one.sums_NF[:, column], other.sums_NF[:, column])
        lse_N = other.sums_NF[:, 0].float() + 0.5  # of the whole vocabulary
        assert torch.equal(one.keys(lse_N), other.keys(lse_N))
        mass_N2 = one.masses(lse_N)
        torch.testing.assert_close(mass_N2, other.masses(lse_N), rtol=1e-12, atol=1e-12)
        level_ND = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * mass_N2[:, :1]
        if size:
            assert torch.equal(one.pick(lse_N, level_ND), other.pick(lse_N, level_ND))
        else:
            assert one.pick(lse_N, level_ND).shape == (3, 2), "any column: none of these levels is here"


def test_the_same_bytes_every_time() -> None:
    """Candidates lie in any order; their keys have one."""
    logits, target_N, uniform_N = made_rows(700, torch.float32, CPU)
    reader = SlicedReader(RowReader(5, torch.arange(9), (2.0,), Sampler(2, 0, 600)), KernelScan, 700)
    one, other = (reader.figures(logits[1:4], target_N[1:4], uniform_N[1:4]) for _ in range(2))
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.draws, other.draws)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits, target_N, _ = made_rows(700, torch.float32, CPU)
    logits[0, 321] = bad
    with pytest.raises(XtokenError, match="NaN or infinity"):
        SlicedReader(RowReader(5, torch.arange(9)), KernelScan, 700).read(logits[:1], target_N[:1])


def test_kernels_are_used_where_they_agree(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = RowReader(5, torch.arange(9))
    monkeypatch.setattr(fast_rows, "_ROWS", ((700, 5),))
    agrees.cache_clear()
    assert agrees(CPU)
    reader = open_reader(asked, CPU, 700)
    assert isinstance(reader, SlicedReader)
    assert reader.scan is KernelScan
    assert caplog.records == []

    monkeypatch.setattr(KernelScan, "keys", lambda self, lse_N: TorchScan.keys(self, lse_N + 1))
    agrees.cache_clear()
    assert open_reader(asked, CPU, 700) is asked
    (record,) = caplog.records
    assert record.message == (
        "Triton kernels are not used, torch reads the rows: logprob of torch.float32 logits [9, 700], k 5"
    )
    agrees.cache_clear()


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xtoken.pipeline.teachers import row_kernels

pointers = {"logits": sys.argv[2], "label_column": "*i64", "space_bits": "*i32", "order": "*i32", "chosen": "*i32"}
pointers |= {"keys": "*i64", "found": "*i32", "level": "*fp64", "tile": "*i64"} | dict.fromkeys(
    ("label", "scale", "lse", "floor"), "*fp32")
constants = {"TILE": 512, "BLOCK": 2, "TAUS": 2, "ROOM": 256, "READERS": 8}
outs = {"scan_tiles": "*fp32", "collect": "", "tile_masses": "*fp64", "pick_columns": "*i64"}
for name, out in outs.items():
    kernel = getattr(row_kernels, name)
    values = {given: constants[given] for given in kernel.arg_names if given in constants}
    types = pointers | {"out": out} | dict.fromkeys(values, "constexpr")
    source = ASTSource(kernel, {given: types.get(given, "i32") for given in kernel.arg_names}, values)
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 1})
    print(name, len(made.asm["cubin"]))
"""


@pytest.mark.parametrize(("capability", "logits"), [(80, "*fp32"), (90, "*bf16")])
def test_kernels_compile_for_gpus(capability: int, logits: str, tmp_path: Path) -> None:
    """To machine code, which needs no GPU: the interpreter is more patient than the compiler."""
    script = tmp_path / "compile.py"  # Triton reads sources of functions from files
    script.write_text(COMPILE)
    environment: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(script), str(capability), logits]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = dict(line.split() for line in done.stdout.splitlines())
    assert list(sizes) == ["scan_tiles", "collect", "tile_masses", "pick_columns"]
    assert all(int(size) > 1000 for size in sizes.values())


def test_the_check_for_gpus_runs(tmp_path: Path) -> None:
    """As a toy, by the interpreter."""
    root = Path(cli.__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / ".dev"), str(root)])}
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path), "--only", "kernels"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("passed   kernels: "), done.stdout
