"""Checks of vLLM's engine: what rows cost it, its sudden end, a model that also sees pictures."""

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_check.capturing import NEAR
from benchmarks.gpu_check.inputs import PEAKED, TRAINED, Figures, model, on_gpu, tokenizer

LENGTH, TURNS = 1000, 3
PROMPTS = {True: 300, False: 3}
STEPS = {True: (2_048, 16_384), False: (256, 2_048)}  # tokens of an engine's step
NOTICED = 10.0  # seconds
# Width, inner width, layers, heads, key-value heads, width of a head, vocabulary: a few layers of Gemma-3-4b's text
# model; then width, inner width, heads, size of a picture: of its vision model.
TEXT = {True: (2560, 10_240, 4, 8, 4, 256, 262_208), False: (128, 256, 2, 2, 1, 64, 1_280)}
VISION = {True: (1152, 4304, 16, 896), False: (64, 64, 2, 28)}


def opened(folder: Path, **settings: Any) -> Any:
    """A teacher by vLLM, its engine a process of its own."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    # vLLM's processes import this file, and its CPU build stumbles over numba there
    from xtoken.pipeline.teachers.vllm_teacher import open_teacher
    from xtoken.pipeline.tokens import load_tokenizer
    from xtoken.schemas.configs.capture import PrecomputeConfig

    wanted = {"backend": "vllm", "k": 64, "max_tokens": 1024} | settings
    config = PrecomputeConfig.from_flat(corpus="-", out="-", teacher=str(folder), **wanted)
    return open_teacher(config.teacher, config.codec, load_tokenizer(str(folder)).table)


def prompts(count: int) -> list[NDArray[np.int32]]:
    """Tokens at random."""
    return list(np.random.default_rng(0).integers(20, TRAINED, (count, LENGTH)).astype(np.int32))


def rate_small(work: Path) -> Figures:
    """Small steps of the engine."""
    return _rate(work, STEPS[on_gpu()][0])


def rate_large(work: Path) -> Figures:
    """Large ones."""
    return _rate(work, STEPS[on_gpu()][1])


def _rate(work: Path, step: int) -> Figures:
    """The same prompts through one engine: by ``LLM.generate`` without log-probabilities, and streamed for rows as a
    capture does it (packing and writing them is benchmarks.overhead's)."""
    from vllm import SamplingParams

    teacher = opened(model(work, "teacher"), batch_tokens=step)
    engine, batch = teacher._engine, prompts(PROMPTS[on_gpu()])
    asked = [{"prompt_token_ids": ids.tolist()} for ids in batch]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def bare() -> None:
        assert len(engine._llm.generate(asked, sampling, use_tqdm=False)) == len(batch)

    def rows() -> None:
        assert sum(1 for _ in teacher.stream(iter([list(enumerate(batch))]))) == len(batch)

    seconds: dict[str, list[float]] = {"bare": [], "rows": []}
    for _ in range(TURNS):
        for name, work_of in (("bare", bare), ("rows", rows)):
            seconds[name].append(_seconds(work_of))
    # the first turn warms up
    median = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    tokens = len(batch) * LENGTH
    return {
        "step": engine.step_tokens,
        "path": engine.path,
        "runner": engine.settings["model_runner"],
        "tokens per second without rows": tokens / median["bare"],
        "tokens per second with rows": tokens / median["rows"],
        "ratio": median["bare"] / median["rows"],
    }


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def slices(work: Path) -> Figures:
    """A teacher on two GPUs, each of which reads its own part of the vocabulary, against vLLM's gathered logits."""
    teacher, batch = opened(model(work, "teacher"), tensor_parallel=2), prompts(3)
    if teacher.info.capture_path != "vllm-sliced-rows":
        raise AssertionError(f"rows are taken by {teacher.info.capture_path}; the log says why")
    pairs = list(zip(teacher.rows(batch), teacher.second_path(batch), strict=True))
    apart = max(float(np.abs(one.target_logprob - other.target_logprob).mean()) for one, other in pairs)
    ranks = float(np.mean([(one.target_rank == other.target_rank).mean() for one, other in pairs]))
    if apart > NEAR:
        raise AssertionError(f"labels' log-probabilities by slices and gathered are {apart:.3f} nats apart")
    return {"labels apart, nats": apart, "same ranks": ranks}


def killed(work: Path) -> Figures:
    """How long a step that waits is left waiting once its engine's process is killed."""
    from xtoken.schemas.errors import XtokenError

    teacher = opened(model(work, "teacher"))
    core = teacher._engine._core
    (process,) = core.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGSTOP)  # so that it is certain to be in the middle of the step
    at: list[float] = []

    def kill() -> None:
        while not core.has_unfinished_requests():
            time.sleep(0.01)
        at.append(time.monotonic())
        os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        teacher.rows(prompts(1))
    except XtokenError as error:
        noticed, said = time.monotonic(), str(error)
    else:
        raise AssertionError("rows came from an engine that was killed")
    killer.join()
    found: Figures = {"seconds": noticed - at[0], "said": said[:80]}
    if found["seconds"] > NOTICED:
        raise AssertionError(f"the end of the engine's process was noticed after {found['seconds']:.0f} s")
    return found


def pictures(work: Path) -> Figures:
    """A Gemma 3 that also sees pictures opens as a teacher of text, with the rows that transformers gives."""
    folder = work / "pictures"
    loaded = seeing(folder)
    ids = prompts(1)[0][:256]
    device = next(loaded.parameters()).device
    with torch.inference_mode():
        logits_RU = loaded(torch.from_numpy(ids[None].astype(np.int64)).to(device)).logits[0, :-1].float()
    label_R1 = torch.from_numpy(ids[1:].astype(np.int64)).to(device)[:, None]
    theirs = logits_RU.log_softmax(-1).gather(1, label_R1)[:, 0].cpu().numpy()
    del loaded, logits_RU
    if on_gpu():
        torch.cuda.empty_cache()
    teacher = opened(folder)
    (rows,) = teacher.rows([ids])
    apart = float(np.abs(rows.target_logprob - theirs).mean())
    if apart > NEAR:
        raise AssertionError(f"labels' log-probabilities by transformers and vLLM are {apart:.3f} nats apart")
    return {"path": teacher.info.capture_path, "labels apart, nats": apart}


def seeing(folder: Path) -> Any:
    """A random Gemma 3 with a vision model, saved to ``folder`` with a tokenizer."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    width, inner, layers, heads, groups, head, vocabulary = TEXT[on_gpu()]
    text = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head}
    text |= {"query_pre_attn_scalar": head, "sliding_window": 1024, "max_position_embeddings": 8192}
    width, inner, heads, size = VISION[on_gpu()]
    vision = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_hidden_layers": 2}
    vision |= {"image_size": size, "patch_size": 14}
    places = {name: vocabulary - at for at, name in enumerate(("image_token_id", "boi_token_id", "eoi_token_id"), 1)}
    tokens = max(1, (size // 14 // 4) ** 2) if on_gpu() else 1
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=tokens, **places)
    with torch.device("cuda" if on_gpu() else "cpu"):
        made: Any = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        made.get_input_embeddings().weight.mul_(PEAKED)
    made.to(torch.bfloat16 if on_gpu() else torch.float32).save_pretrained(folder)
    tokenizer(folder, vocabulary, len("pictures"))
    return made
