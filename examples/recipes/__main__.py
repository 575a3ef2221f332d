"""A paper's experiment by xtoken's verbs, with its models and data by their names on the Hugging Face hub.

    python -m examples.recipes                                         # what there is
    python -m examples.recipes llama-3.2-1b-from-qwen3-4b WORK --dry-run      # verbs, flags, tasks, cost; no download
    python -m examples.recipes llama-3.2-1b-from-qwen3-4b WORK --scale .01    # a hundredth of its documents and steps
    python -m examples.recipes llama-3.2-1b-from-qwen3-4b WORK --gpus 8       # all of it; the same command resumes

No result is claimed: nobody has run them yet. Costs are computed, not measured.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import typer
import yaml

from xtoken import cli
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.base import Config
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.configs.transplant import TransplantConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.flags import build

HERE = Path(__file__).parent
VERBS: dict[str, type[Config]] = {
    "precompute": PrecomputeConfig,
    "align": AlignConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "transplant": TransplantConfig,
}
# An H100's dense peak in bfloat16 is 989 TFLOP/s; some two fifths of it are what well-made loops reach.
FLOPS = 4e14


def main() -> None:
    """List the recipes, look at one, or run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("work", nargs="?", help="folder for captures, targets and runs")
    parser.add_argument("--dry-run", action="store_true", help="check verbs, flags and tasks, print costs, run nothing")
    parser.add_argument("--scale", type=float, default=1.0, help="share of documents and steps")
    parser.add_argument("--gpus", type=int, default=1, help="of this machine")
    options = parser.parse_args()
    known = recipes()
    if options.recipe is None:
        for name, recipe in known.items():
            print(f"{name}\n    {recipe['what']} ({recipe['source']})")
        return
    if options.recipe not in known:
        parser.error(f"no recipe {options.recipe!r}; there are {', '.join(known)}")
    if options.work is None:
        parser.error("no folder to work in; name one behind the recipe")
    if not 0 < options.scale <= 1 or options.gpus < 1:
        parser.error(f"--scale {options.scale:g} --gpus {options.gpus}: a share of at most 1, and at least one GPU")
    recipe = known[options.recipe]
    verbs = list(commands(recipe, options.work, options.scale))
    for words in verbs:  # the last before the first begins, which takes days
        check(words)
    for words in verbs:
        command = on_gpus(words, options.gpus)
        print(shlex.join(["python", *command]), flush=True)
        if not options.dry_run:
            subprocess.run([sys.executable, *command], check=True)
    if options.dry_run:
        print("\n".join(["", *costs(recipe, options.scale)]))
        print("Verbs, flags and lm-eval's tasks are checked. Nothing was downloaded: whether the hub has these names")
        print("is not known.")


def recipes() -> dict[str, Mapping[str, Any]]:
    """By name."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.yaml"))}


def commands(recipe: Mapping[str, Any], work: str, scale: float) -> Iterator[list[str]]:
    """Words of each verb; documents, steps and warm-up are scaled."""
    numbers = {name: max(1, round(recipe[name] * scale)) for name in ("documents", "steps", "warmup")}
    for step in recipe["verbs"]:
        yield shlex.split(step.format(work=work.rstrip("/"), **numbers))


def on_gpus(words: list[str], gpus: int) -> list[str]:
    """What Python runs for a verb on so many GPUs of this machine: an engine on each, a rank of the trainer on each."""
    if words[0] == "train" and gpus > 1:
        return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m", "xtoken", *words]
    workers = ["--workers", str(gpus)] if words[0] == "precompute" and gpus > 1 else []
    return ["-m", "xtoken", *words, *workers]


def check(words: list[str]) -> Config:
    """What a command's flags make; its tasks must be known to lm-eval. Nothing is read or downloaded.

    Raises:
        SystemExit: they are refused.
    """
    verb, *rest = words
    group: Any = typer.main.get_command(cli.app)
    try:
        parsed = group.commands[verb].make_context(verb, [*rest])
        config = build(VERBS[verb], _values(VERBS[verb], parsed.params))
    except (XtokenError, typer.TyperException) as error:
        raise SystemExit(f"xtoken {shlex.join(words)}: {error}") from error
    if isinstance(config, EvalConfig) and config.tasks:
        _check_tasks(config.tasks)
    return config


def _values(model: type[Config], params: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in params.items() if name not in ("config", "json", "quiet", "as_json")}
    if model is PrecomputeConfig:  # one configuration for each teacher
        values["teacher"] = values["teacher"][0]
    return values


def _check_tasks(tasks: list[str]) -> None:
    for task in tasks:
        if task not in _known_tasks():
            raise SystemExit(f"lm-eval has no task {task!r}; 'lm-eval ls tasks' lists them")


@cache
def _known_tasks() -> frozenset[str]:
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().all_tasks)


def costs(recipe: Mapping[str, Any], scale: float) -> list[str]:
    """GPU-hours and bytes, by arithmetic."""
    cost, lines = recipe["cost"], []
    tokens = recipe["steps"] * cost["step_tokens"] * scale
    for teacher, parameters in cost["teachers"].items():
        hours = 2 * parameters * tokens / FLOPS / 3600
        size = tokens * cost["bytes_per_token"] / 1e9
        lines.append(f"capture of {teacher}: {hours:,.1f} GPU-hours, {size:,.0f} GB")
    live = sum(2 * parameters for parameters in cost["teachers"].values())
    student = 6 * cost["student"]
    lines.append(f"training: {student * tokens / FLOPS / 3600:,.1f} GPU-hours; with the teachers in every step")
    lines[-1] += f" {(student + live) * tokens / FLOPS / 3600:,.1f}, every time"
    return [f"{tokens:,.0f} tokens; at {FLOPS / 1e12:.0f} TFLOP/s of a GPU, computed:", *lines]


if __name__ == "__main__":
    main()
