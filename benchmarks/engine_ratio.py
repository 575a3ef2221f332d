"""What capture adds to the engine: the same prompts through bare vLLM and through ``precompute``, in turn.

Bare: ``LLM.generate`` on all prompts at once with ``prompt_logprobs`` in the flat form, outputs dropped. Capture: one
worker, everything on, from the moment it is open to its last commit; the audit is left out. Each turn is a process of
its own, loading the model not counted; the ratio is of medians.

    python -m benchmarks.engine_ratio [--tokens 8000] [--turns 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, machine_line
from xtoken.schemas.configs.capture import PrecomputeConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODELS = {"SmolLM2-135M": "smollm2-135m", "Gemma-3-270m": "gemma-3-270m"}
TEXT = ROOT / "examples" / "data" / "moby-dick.jsonl"
SHARD_BYTES = 8_000
BYTES_PER_TOKEN = 4


class Watching:
    """When the worker opened, and when its last part was committed."""

    def __init__(self) -> None:
        self.opened = self.last = 0.0
        self.tokens = 0

    def see(self, event: Any) -> None:
        """See ``Watch``."""
        if event.kind == "opened":
            self.opened = time.monotonic()
        if event.part is not None:
            self.last = time.monotonic()
            self.tokens += event.part.tokens

    def tick(self) -> None:
        """See ``Watch``."""


def settings(model: str, corpus: Path, out: Path) -> PrecomputeConfig:
    """One worker with K = 32 and everything on but the audit."""
    return PrecomputeConfig.from_flat(
        corpus=str(corpus),
        teacher=str(ROOT / ".cache" / "models" / model),
        backend="vllm",
        k=32,
        max_tokens=512,
        shard_bytes=SHARD_BYTES,
        audit="none",
        out=str(out),
    )


def capture(config: PrecomputeConfig) -> dict[str, float]:
    """Tokens and seconds of a run with one worker."""
    from xtoken.pipeline.capture import LocalExecutor, precompute
    from xtoken.schemas.ui.progress import Silent

    watching = Watching()

    class Watched(LocalExecutor):
        """Tells both watches."""

        def run(self, job: Any, shards: Any, watch: Any) -> dict[int, str]:
            """See ``Executor``."""
            del watch
            return super().run(job, shards, watching)

    precompute(config, Silent(), executor=Watched(1))
    return {"tokens": watching.tokens, "seconds": watching.last - watching.opened}


def bare(config: PrecomputeConfig) -> dict[str, float]:
    """Tokens and seconds of the engine alone on the prompts of that run."""
    from xtoken.pipeline.capture.plan import SliceReader, make_plan
    from xtoken.pipeline.corpus import windows
    from xtoken.pipeline.teachers import model_source
    from xtoken.pipeline.teachers.vllm_options import engine_options, find_platform
    from xtoken.pipeline.teachers.vllm_start import start_llm
    from xtoken.pipeline.tokens import load_tokenizer
    from xtoken.schemas.ui.progress import Silent

    tokenizer = load_tokenizer(config.teacher.teacher)
    plan = make_plan(config.corpus, config.run.shard_bytes, Silent())
    reader = SliceReader(config.corpus, plan)
    bos = [tokenizer.table.info.bos_id] if tokenizer.table.info.adds_bos else []
    pieces = [
        window
        for shard in plan.shards
        for document in reader.read(shard)
        for window in windows(document, tokenizer, 512)
    ]
    prompts = [{"prompt_token_ids": [*bos, *window.encoded.ids.tolist()]} for window in pieces]
    platform = find_platform()
    model_config = model_source.load_model_config(config.teacher)
    dtype = "float32" if platform.cpu else "bfloat16"
    llm = start_llm(engine_options(config.teacher, config.codec, model_config, dtype))
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=32, flat_logprobs=True, detokenize=False)
    llm.generate(prompts[:1], sampling, use_tqdm=False)  # whatever is done once, as the self-test does for capture
    began = time.monotonic()
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        del output
    seconds = time.monotonic() - began
    return {"tokens": sum(len(window.encoded.ids) for window in pieces), "seconds": seconds}


def turn(what: str, model: str, corpus: Path, folder: Path) -> dict[str, float]:
    """One process."""
    out = folder / f"{what}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "benchmarks.engine_ratio", what, model, str(corpus), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def cut_corpus(path: Path, tokens: int) -> None:
    """Real text of about so many tokens."""
    left = tokens * BYTES_PER_TOKEN
    with path.open("w", encoding="utf-8") as file:
        for line in TEXT.read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            for start in range(0, len(text), 6_000):
                if left <= 0:
                    return
                piece = text[start : start + min(6_000, left)]
                left -= len(piece.encode())
                file.write(json.dumps({"text": piece}) + "\n")


def measure(model: str, tokens: int, turns: int) -> dict[str, Any]:
    """Both in turn; tokens per second of each turn."""
    rates: dict[str, list[float]] = {"bare": [], "capture": []}
    with tempfile.TemporaryDirectory(prefix="xtoken-ratio-") as name:
        corpus = Path(name) / "corpus.jsonl"
        cut_corpus(corpus, tokens)
        for _ in range(turns):
            counted = set()
            for what, found in rates.items():
                one = turn(what, model, corpus, Path(name))
                counted.add(one["tokens"])
                found.append(round(one["tokens"] / one["seconds"], 1))
            assert len(counted) == 1, f"both must score the same tokens: {counted}"
    median = {what: statistics.median(found) for what, found in rates.items()}
    return {"tokens": int(counted.pop()), **rates, "ratio": round(median["capture"] / median["bare"], 3)}


def report(found: dict[str, Any], told: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        "# Capture against bare vLLM",
        "",
        f"`python -m benchmarks.engine_ratio --tokens {told['tokens']} --turns {told['turns']}`: one worker, K = 32.",
        machine_line() + ".",
        "",
        "| model | tokens | bare vLLM, tokens/s | xtoken precompute, tokens/s | ratio of medians |",
        "|---|---|---|---|---|",
    ]
    for name, one in found.items():
        rates = [", ".join(f"{rate:,.0f}" for rate in one[what]) for what in ("bare", "capture")]
        lines.append(f"| {name} | {one['tokens']:,} | {rates[0]} | {rates[1]} | {one['ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the module."""
    if len(sys.argv) > 1 and sys.argv[1] in ("bare", "capture"):
        what, model, corpus, out = sys.argv[1:5]
        print(json.dumps({"bare": bare, "capture": capture}[what](settings(model, Path(corpus), Path(out)))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    found = {name: measure(folder, args.tokens, args.turns) for name, folder in MODELS.items()}
    text = report(found, vars(args))
    print(text)
    RESULTS.joinpath("engine_ratio.md").write_text(text, encoding="utf-8")
    RESULTS.joinpath("engine_ratio.json").write_text(
        json.dumps({"machine": machine(), **found}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
