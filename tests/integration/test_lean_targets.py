"""Real distributions in steps: what rounding costs, whatever was asked of them, and how many bytes it saves."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from in_process import InProcess, InThisProcess
from numpy.typing import NDArray

from xtoken.pipeline.align import form
from xtoken.pipeline.align.run import align
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.inspect import bytes_per_token
from xtoken.pipeline.store.reader import iter_targets
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.losses import gap_columns
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.tables import LEAN_TARGETS
from xtoken.schemas.ui.progress import Silent

TEXT = Path(__file__).resolve().parents[2] / "examples" / "data" / "moby-dick-held-out.jsonl"
MOST_KL = 2.5e-5  # nats, mean: what the rounding of a capture costs itself
LOSSES = ["p-kl", "strict", "byte-prefix"]


@pytest.fixture(scope="module")
def capture(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("lean")
    text = json.loads(TEXT.read_text(encoding="utf-8").splitlines()[0])["text"][:6000]
    (root / "corpus.jsonl").write_text(json.dumps({"text": text}) + "\n")
    config = PrecomputeConfig.from_flat(
        corpus=str(root / "corpus.jsonl"), teacher=str(smollm2_dir), out=str(root / "c"), temperatures=[2.0]
    )
    precompute(config, Silent(), executor=InProcess())
    return str(root / "c")


def aligned(capture: str, out: Path, version: int, **options: Any) -> str:
    config = AlignConfig(captures=[capture], out=str(out), **options)
    with mock.patch.object(form, "WRITTEN", version):
        align(config, Silent(), executor=InThisProcess())
    return str(out)


def kl(old: str, new: str, losses: list[str]) -> dict[str, NDArray[np.float64]]:
    """KL(old || new) of each target with entries, by column; both sides over what they add up to."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for before, after in zip(iter_targets(old), iter_targets(new), strict=True):
        for gaps in gap_columns(losses):
            count = flat(before, gaps.count)
            starts = np.cumsum(count) - count
            p, q = (np.exp(flat(one, gaps.logprob).astype(np.float64)) for one in (before, after))
            ends = [np.zeros(len(count))] * 2
            if gaps.tail:
                ends = [np.exp(flat(one, gaps.tail).astype(np.float64)) for one in (before, after)]
            for at in np.flatnonzero(count):
                span = slice(starts[at], starts[at] + count[at])
                cells = [np.append(one[span], end[at]) for one, end in zip((p, q), ends, strict=True)]
                here, there = (one[cells[0] > 0] / one.sum() for one in cells)
                found.setdefault(gaps.logprob, []).append(np.array([(here * np.log(here / there)).sum()]))
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize(
    ("losses", "options", "step"),
    [
        (LOSSES, {}, 1 / 32),
        (["p-kl"], {"entries": 8}, 1 / 32),
        (["p-kl"], {"unreached": "rest"}, 1 / 32),
        (["p-kl"], {"merge": "mean"}, 2.0**-10),
        (LOSSES, {"tau": 2.0}, 2.0**-10),
    ],
)
def test_rounding_costs_little(
    capture: str, gemma3_dir: Path, tmp_path: Path, losses: list[str], options: dict[str, Any], step: float
) -> None:
    both = {"losses": losses, "student": str(gemma3_dir), **options}
    old = aligned(capture, tmp_path / "old", LEAN_TARGETS - 1, **both)
    new = aligned(capture, tmp_path / "new", LEAN_TARGETS, **both)
    found = kl(old, new, losses)
    assert len(found) == len(losses)
    for name, kl_C in found.items():
        assert len(kl_C) > 100
        assert -1e-9 < kl_C.mean() <= MOST_KL, name
        assert kl_C.max() <= step**2 / 8 + 1e-6, name
    assert read_manifest(capture, CaptureManifest).codec.step == 1 / 32


def test_p_kl_takes_no_more_bytes_than_the_rows_it_came_from(capture: str, gemma3_dir: Path, tmp_path: Path) -> None:
    out = aligned(capture, tmp_path / "t", LEAN_TARGETS, losses=["p-kl"], student=str(gemma3_dir))
    source, made = read_manifest(capture, CaptureManifest), read_manifest(out, TargetManifest)
    size = {"source": bytes_per_token(capture, source), "made": bytes_per_token(out, made)}
    # of the capture neither text nor what p-kl does not read
    unread = ("all", "text", "space_logprob", "tau_rest_odds")
    ours = sum(value for name, value in size["made"].items() if name != "all")
    assert ours <= sum(value for name, value in size["source"].items() if name not in unread)
