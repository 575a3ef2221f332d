"""What a prompt token costs vLLM's frontend and us, by the public flat form and by tensors. No engine runs.

    python -m benchmarks.vllm_frontend    # writes benchmarks/results/vllm_frontend.json and .md

The tensors of a prompt of 512 tokens, made from random logits of a real head's width, go 20 times a pass through
vLLM's own ``LogprobsProcessor`` as they would from an engine, then through our reading, checks and ordering. CPU time
of this process, median of seven passes after one. ``transport`` is what an engine process of its own adds: messages
packed and unpacked by vLLM's serializer. Both ways' rows are compared.
"""

import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import machine, machine_line
from xtoken.pipeline.teachers import vllm_engine, vllm_options
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.vllm_replies import read_entries
from xtoken.pipeline.teachers.vllm_teacher import rows_from

RESULTS = Path(__file__).parent / "results"
PROMPTS, TOKENS, VOCABULARY, PASSES = 20, 512, 151_936, 7
STAGES = ("transport", "vllm", "read", "check and order")


def made(k: int) -> tuple[NDArray[np.int32], Any]:
    """A prompt and the tensors that an engine would send for it."""
    from vllm.v1.outputs import LogprobsTensors

    generator = torch.Generator().manual_seed(k)
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    logprob = (torch.randn(TOKENS - 1, VOCABULARY, generator=generator) * 3).log_softmax(-1)
    realised = logprob.gather(1, ids[1:, None])
    top = logprob.topk(k)
    token = torch.cat([ids[1:, None], top.indices], 1).int()
    rank = (logprob >= realised).sum(1).int()
    return ids.int().numpy(), LogprobsTensors(token, torch.cat([realised, top.values], 1), rank)


def processor(k: int, flat: bool) -> Any:
    """vLLM's processor of a new request."""
    from vllm.logprobs import create_prompt_logprobs
    from vllm.v1.engine.logprobs import LogprobsProcessor

    return LogprobsProcessor(
        tokenizer=None,
        logprobs=None,
        prompt_logprobs=create_prompt_logprobs(flat),
        cumulative_logprob=None,
        num_logprobs=None,
        num_prompt_logprobs=k,
    )


def transported(tensors: Any) -> Any:
    """Tensors after vLLM's serializer, packed and unpacked."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    output = EngineCoreOutput(request_id="0", new_token_ids=[1], new_prompt_logprobs_tensors=tensors)
    frames = [bytes(frame) for frame in MsgpackEncoder().encode(EngineCoreOutputs(outputs=[output]))]
    return MsgpackDecoder(EngineCoreOutputs).decode(frames).outputs[0].new_prompt_logprobs_tensors


def one_pass(ids: NDArray[np.int32], tensors: Any, k: int, flat: bool) -> tuple[list[float], TeacherRows]:
    """CPU seconds of each stage for one prompt, and its rows."""
    clock: Callable[[], float] = time.process_time
    times = [clock()]
    arrived = transported(tensors)
    times.append(clock())
    request = processor(k, flat)
    request._update_prompt_logprobs(arrived)
    times.append(clock())
    entries = read_entries(request.prompt_logprobs, len(ids) - 1, k)
    times.append(clock())
    assert entries is not None
    rows, broken = rows_from(ids, entries, VOCABULARY)
    times.append(clock())
    assert not broken
    return [after - before for before, after in pairwise(times)], rows


def measured(k: int) -> dict[str, dict[str, float]]:
    """Microseconds per prompt token of each stage, by way."""
    prompts = [made(k)] * PROMPTS
    vllm_engine.install()
    found = {}
    kept = {}
    for way in ("flat", "tensors"):
        passes = []
        for _ in range(PASSES + 1):
            stages = [one_pass(ids, tensors, k, way == "flat") for ids, tensors in prompts]
            passes.append(np.sum([times for times, _ in stages], axis=0) / (PROMPTS * TOKENS) * 1e6)
            kept[way] = stages[0][1]
        medians = [statistics.median(column) for column in np.array(passes[1:]).T.tolist()]
        found[way] = {**dict(zip(STAGES, medians, strict=True)), "total": sum(medians)}
    for column in ("ids", "logprob", "target_logprob", "target_rank"):
        np.testing.assert_array_equal(getattr(kept["flat"], column), getattr(kept["tensors"], column))
    return found


def report(figures: dict[int, dict[str, dict[str, float]]]) -> str:
    """The figures as Markdown."""
    lines = [
        "# What a prompt token costs in vLLM's frontend",
        "",
        f"`python -m benchmarks.vllm_frontend`: {vllm_options.version()}, {machine_line()}.",
        "",
        "CPU microseconds per prompt token. transport: only where the engine has a process of its own. vllm: what its",
        "frontend makes of the tensors. read, check and order: ours.",
        "",
        "| k | way | " + " | ".join(STAGES) + " | total | tokens per CPU second |",
        "|---|---|" + "---|" * (len(STAGES) + 2),
    ]
    for k, ways in figures.items():
        for way, stages in ways.items():
            cells = " | ".join(f"{stages[name]:.2f}" for name in (*STAGES, "total"))
            lines.append(f"| {k} | {way} | {cells} | {1e6 / stages['total']:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    vllm_options.find_platform()
    torch.set_num_threads(1)
    figures = {k: measured(k) for k in (32, 64)}
    text = report(figures)
    print(text)
    RESULTS.joinpath("vllm_frontend.md").write_text(text, encoding="utf-8")
    stored = {"machine": machine(), "vllm": vllm_options.version(), "microseconds_per_token": figures}
    RESULTS.joinpath("vllm_frontend.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
