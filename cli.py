"""The verbs of xtoken: parse, build the configuration, call, show. Nothing else lives here.

Every verb is declared by a configuration of ``schemas.config``: its fields are the flags. This is
also the only place where the pipeline and the trainer meet.
"""

import functools
import inspect as python_inspect
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console

from schemas.config import (
    AlignConfig,
    CorpusConfig,
    DemoConfig,
    EstimateConfig,
    EvalConfig,
    InspectConfig,
    PrecomputeConfig,
    ProjectConfig,
    TrainConfig,
    VerifyConfig,
)
from schemas.errors import XtokenError
from schemas.progress import Bars
from schemas.share_config import CardConfig, MergeConfig, PullConfig, PushConfig
from trainer.report.tables import figure_tables

if TYPE_CHECKING:
    from pipeline.tokens import TextTokenizer
    from trainer.evaluate import EvalSample

app = typer.Typer(
    help="Distil from teachers that speak another tokenizer: capture the teacher once, train any student.\n\n"
    "The way: precompute -> align -> train. 'xtoken demo' walks it on real models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
share_app = typer.Typer(
    help="Publish, fetch, check, describe and join captures on any folder or object store.", no_args_is_help=True
)
app.add_typer(share_app, name="share")
INTERRUPTED = 130
C = TypeVar("C", bound=BaseModel)
Figures = dict[str, Any]
LISTS = (list[str], list[float])  # written with commas on the command line
Verb = Callable[[Any, Bars], Figures]


def _show(figures: Figures, as_json: bool) -> None:
    """Print figures: one JSON object, or tables."""
    if as_json:
        sys.stdout.write(json.dumps(figures, ensure_ascii=False, default=str) + "\n")
    else:
        Console().print(*figure_tables(figures), sep="\n")


def _options(model: type[BaseModel]) -> list[python_inspect.Parameter]:
    """One typer parameter per field of a configuration."""
    parameters = []
    for name, field in model.model_fields.items():
        argument = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("argument")
        kind: Any = field.annotation
        default: Any = python_inspect.Parameter.empty if field.default is PydanticUndefined else field.default
        if kind in LISTS:
            kind, default = str, default if default is python_inspect.Parameter.empty else ",".join(map(str, default))
        flag = _flag(name, field)
        shown = f"--{flag}/--no-{flag}" if kind is bool and default is True else f"--{flag}"
        info: Any = typer.Argument(help=field.description) if argument else typer.Option(shown, help=field.description)
        keyword = python_inspect.Parameter.KEYWORD_ONLY
        parameters.append(python_inspect.Parameter(name, keyword, default=default, annotation=Annotated[kind, info]))
    # Arguments stand first on the command line whatever class declared them.
    return sorted(parameters, key=lambda p: not isinstance(p.annotation.__metadata__[0], type(typer.Argument())))


def _build(model: type[C], values: dict[str, Any]) -> C:
    for name, field in model.model_fields.items():
        if field.annotation in LISTS and name in values:
            values[name] = [item.strip() for item in str(values[name]).split(",") if item.strip()]
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        where = (
            f"--{_flag(name, model.model_fields[name])}: " if name in model.model_fields else f"--{name}: " * bool(name)
        )
        found = f" (it is {first['input']!r})" if first["type"] != "value_error" else ""
        raise XtokenError(where + first["msg"].removeprefix("Value error, ") + found) from error


def _flag(name: str, field: FieldInfo) -> str:
    return (field.alias or name).replace("_", "-")


def _guarded(work: Callable[[Bars], Figures], as_json: bool, quiet: bool) -> None:
    """Run a verb; turn the user's errors into a message and an exit code."""
    bars = Bars(quiet or as_json)
    try:
        figures = work(bars)
    except XtokenError as error:
        bars.finish()
        _complain(str(error), type(error).__name__, as_json)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        bars.finish()
        _complain("interrupted; what was committed stays, the same command resumes", "Interrupted", as_json)
        raise typer.Exit(INTERRUPTED) from error
    bars.finish()
    _show(figures, as_json)


def _complain(message: str, kind: str, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "kind": kind}) + "\n")
    Console(stderr=True, soft_wrap=True).print("[red]error:[/red]", end=" ")
    sys.stderr.write(message + "\n")


JSON_FLAG = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")]
QUIET_FLAG = Annotated[bool, typer.Option("--quiet", help="No progress.")]


class verb:  # noqa: N801 - used as a decorator
    """Register a function of (configuration, bars) as a verb whose flags are the configuration's fields."""

    def __init__(self, model: type[BaseModel], example: str, group: typer.Typer = app) -> None:
        self.model, self.example, self.group = model, example, group

    def __call__(self, function: Verb) -> Verb:
        keyword = python_inspect.Parameter.KEYWORD_ONLY
        parameters = _options(self.model)
        for name, flag in (("as_json", JSON_FLAG), ("quiet", QUIET_FLAG)):
            parameters.append(python_inspect.Parameter(name, keyword, default=False, annotation=flag))
        command: Any = functools.partial(_run_verb, function, self.model)
        command.__signature__ = python_inspect.Signature(parameters)
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        text = f"{self.model.__doc__}\n\nExample: {self.example}"
        name = function.__name__.removeprefix("run_").removeprefix("share_")
        self.group.command(name, help=text)(command)
        return function


def _run_verb(function: Verb, model: type[BaseModel], /, **values: Any) -> None:
    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    _guarded(lambda bars: function(_build(model, values), bars), as_json, quiet)


@verb(PrecomputeConfig, "xtoken precompute corpus.jsonl.zst --teacher Qwen/Qwen3-4B --backend vllm --out capture")
def run_precompute(config: PrecomputeConfig, bars: Bars) -> Figures:
    """Capture a teacher's rows over a corpus."""
    from pipeline.capture import precompute
    from pipeline.store.figures import capture_figures

    began = time.monotonic()
    manifest = precompute(config, bars)
    return capture_figures(manifest) | {"seconds": round(time.monotonic() - began, 1), "out": config.out}


@verb(ProjectConfig, "xtoken project --student HuggingFaceTB/SmolLM2-135M --teacher capture --out w")
def run_project(config: ProjectConfig, bars: Bars) -> Figures:
    """Build W and print its coverage."""
    from pipeline.project import project

    manifest = project(config, bars)
    pair = {"student": manifest.student.name, "teacher": manifest.teacher.name, "rule": config.rule}
    return {**pair, **manifest.coverage, "page": f"{config.out.rstrip('/')}/coverage.html", "out": config.out}


@verb(AlignConfig, "xtoken align capture --student HuggingFaceTB/SmolLM2-135M --out targets --for p-kl,h-kl")
def run_align(config: AlignConfig, bars: Bars) -> Figures:
    """Align a capture with a student's tokenizer."""
    from pipeline.align import align
    from pipeline.store.figures import target_figures

    began = time.monotonic()
    manifest = align(config, bars)
    return target_figures(manifest) | {"seconds": round(time.monotonic() - began, 1), "out": config.out}


@verb(TrainConfig, "xtoken train targets --student HuggingFaceTB/SmolLM2-135M --loss p-kl --out run")
def run_train(config: TrainConfig, bars: Bars) -> Figures:
    """Train a student from targets alone."""
    from pipeline.tokens import load_tokenizer
    from trainer.loop import train

    tokenizer = load_tokenizer(config.tokenizer or config.student, trust_remote_code=config.trust_remote_code)
    samples = eval_samples(config.eval_text, tokenizer, config.max_tokens) if config.eval_text else []
    summary = train(config, tokenizer.table.info, samples, bars)
    return summary | ({"learned_w": _learned_w(config, summary["learned_w"])} if "learned_w" in summary else {})


def _learned_w(config: TrainConfig, files: list[Figures]) -> list[str]:
    """Projection folders of the weights that training left, which 'xtoken align --w' and 'xtoken inspect' read."""
    import numpy as np

    from pipeline.project import write_learned

    folders = []
    for found in files:
        folders.append(found["file"].removesuffix(".npy"))
        weights = np.load(found["file"], allow_pickle=False)
        write_learned(config.targets[found["teacher"]], weights, folders[-1], config.out)
    return folders


@app.command("losses")
def run_losses(as_json: JSON_FLAG = False, quiet: QUIET_FLAG = False) -> None:
    """List the losses: what each matches, what it needs stored, when to use it, where it comes from.

    Example: xtoken losses
    """
    from trainer.losses import loss_rows

    _guarded(lambda _: {"losses": loss_rows(as_json)}, as_json, quiet)


@verb(EvalConfig, "xtoken eval run/model --text held-out.jsonl --targets held-out-targets")
def run_eval(config: EvalConfig, bars: Bars) -> Figures:
    """Measure a model."""
    from pipeline.tokens import load_tokenizer
    from trainer.evaluate import evaluate

    tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
    samples = []
    if config.text:
        samples = eval_samples(config.text, tokenizer, config.max_tokens, config.text_field, config.limit)
    return dict(evaluate(config, tokenizer.table.info, samples, bars))


def eval_samples(
    text: str, tokenizer: "TextTokenizer", max_tokens: int, text_field: str = "text", limit: int | None = None
) -> "list[EvalSample]":
    """Tokenize a held-out corpus for the evaluator, windows cut as at capture."""
    from pipeline.corpus import Corpus, windows
    from trainer.evaluate import EvalSample

    corpus = Corpus(CorpusConfig(corpus=text, text_field=text_field, limit=limit))
    samples = []
    for document in corpus.documents():
        for window in windows(document, tokenizer, max_tokens):
            encoded = window.encoded
            ends = encoded.ends
            samples.append(EvalSample(encoded.ids, int(ends[-1]), int(ends[0])))
    return samples


@verb(InspectConfig, "xtoken inspect capture")
def run_inspect(config: InspectConfig, bars: Bars) -> Figures:  # noqa: ARG001
    """Say what a folder is."""
    from pipeline.store import inspect

    return inspect(config.path)


@verb(VerifyConfig, "xtoken verify s3://team/capture")
def run_verify(config: VerifyConfig, bars: Bars) -> Figures:
    """Check every byte."""
    from pipeline.store import verify

    bars.start("verify", None, "bytes")
    return {"verified": "every file is as its manifest says", **verify(config.path, bars.advance)}


@verb(PushConfig, "xtoken share push capture s3://team/capture --license corpus=cc-by-4.0,outputs=gemma", share_app)
def run_share_push(config: PushConfig, bars: Bars) -> Figures:
    """Publish a capture with its card."""
    from pipeline.store.share import push

    return push(config, bars)


@verb(PullConfig, "xtoken share pull s3://team/capture capture --parts 0-9", share_app)
def run_share_pull(config: PullConfig, bars: Bars) -> Figures:
    """Fetch a capture."""
    from pipeline.store.share import pull

    return pull(config, bars)


verb(VerifyConfig, "xtoken share verify s3://team/capture", share_app)(run_verify)


@verb(CardConfig, "xtoken share card capture --license corpus=cc-by-4.0,outputs=gemma", share_app)
def run_share_card(config: CardConfig, bars: Bars) -> Figures:
    """Write a capture's dataset card."""
    from pipeline.store.card import write_card

    return write_card(config, bars)


@verb(MergeConfig, "xtoken share merge capture-a,capture-b joined", share_app)
def run_share_merge(config: MergeConfig, bars: Bars) -> Figures:
    """Join captures."""
    from pipeline.store.merge import merge

    return merge(config, bars)


@verb(EstimateConfig, "xtoken estimate corpus.jsonl.zst --teacher Qwen/Qwen3-4B --k 32")
def run_estimate(config: EstimateConfig, bars: Bars) -> Figures:
    """What a capture will cost."""
    from pipeline.capture.estimate import estimate

    return estimate(config, bars)


HERE = Path(__file__).resolve().parent


@verb(DemoConfig, "xtoken demo --out demo-run")
def run_demo(config: DemoConfig, bars: Bars) -> Figures:
    """Walk the whole way on real models and compare P-KL with CE alone."""
    began = time.monotonic()
    models, texts = os.path.relpath(HERE / ".cache" / "models"), os.path.relpath(HERE / "examples" / "data")
    teacher, student = config.teacher or f"{models}/gemma-3-270m", config.student or f"{models}/smollm2-135m"
    for source in (teacher, student, texts):
        if source.startswith((models, texts)) and not Path(source).is_dir():
            raise XtokenError(
                f"{source} does not exist: 'make demo' in a clone of the repository prepares what the demo needs"
            )
    out = config.out
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    captures = {}
    for name, text, tokens in (("train", "moby-dick.jsonl", 512), ("held-out", "moby-dick-held-out.jsonl", 512)):
        capture, targets = f"{out}/capture-{name}", f"{out}/targets-{name}"
        flags = {
            "corpus": f"{texts}/{text}",
            "id_field": "id",
            "teacher": teacher,
            "out": capture,
            "max_tokens": tokens,
            "shard_bytes": 1 << 15,
        }
        captures[name] = _step(say, run_precompute, PrecomputeConfig, flags, bars)
        if name == "train":
            _step(say, run_project, ProjectConfig, {"student": student, "teacher": capture, "out": f"{out}/w"}, bars)
        flags = {"capture": capture, "student": student, "out": targets, "w": f"{out}/w", "losses": "p-kl"}
        captures[name] |= {f"align_{k}": v for k, v in _step(say, run_align, AlignConfig, flags, bars).items()}
    measure = {"eval_text": f"{texts}/moby-dick-held-out.jsonl", "eval_targets": f"{out}/targets-held-out"}
    runs = {}
    for loss, weights in (("p-kl", {"kd_weight": 1.0, "ce_weight": 1.0}), ("ce", {})):
        flags = {"targets": f"{out}/targets-train", "student": student, "out": f"{out}/run-{loss}", "loss": loss}
        flags |= {"steps": config.steps, "step_tokens": 512, "micro_tokens": 512, "warmup": 5, **weights, **measure}
        runs[loss] = _step(say, run_train, TrainConfig, flags, bars)
    return _demo_table(out, captures, runs, time.monotonic() - began)


def _step(
    say: Callable[..., None], run: Callable[[Any, Bars], Figures], model: type[C], flags: Figures, bars: Bars
) -> Figures:
    """Say the command that does the same, then do it."""
    names = {name: _flag(name, field) for name, field in model.model_fields.items()}
    words = [str(v) for k, v in flags.items() if k in ("corpus", "capture", "targets")]
    words += [
        w for k, v in flags.items() if k not in ("corpus", "capture", "targets") for w in (f"--{names[k]}", str(v))
    ]
    if not bars.quiet:
        say(f"$ xtoken {run.__name__.removeprefix('run_')} {shlex.join(words)}", style="bold")
    return run(_build(model, dict(flags)), bars)


def _demo_table(out: str, captures: Figures, runs: Figures, seconds: float) -> Figures:
    """The demo's figures: one row per model on the held-out chapter."""
    from trainer.report.loss_plot import plot_losses

    train = captures["train"]
    plot_losses({loss: f"{out}/run-{loss}" for loss in runs}, f"{out}/loss.png")
    names = ("bits_per_byte", "kl", "top1_agreement")
    before = runs["ce"]["before"]
    rows = [{"model": "teacher", "bits_per_byte": before["teacher_bits_per_byte"]}]
    rows.append({"model": "student before"} | {name: before[name] for name in names})
    for loss, run in runs.items():
        rows.append({"model": f"student after {loss}"} | {name: run["after"][name] for name in names})
    return {
        "tokens_captured": train["tokens"],
        "tokens_per_second": train["tokens"] / train["seconds"],
        "bytes_per_token": train["bytes_per_token"],
        "entries_per_row": train["entries_per_row"],
        "share_of_1_1_chunks": train["align_share_of_1_1_chunks"],
        "training_steps": runs["ce"]["steps"],
        "minutes": seconds / 60,
        "plot": f"{out}/loss.png",
        "held_out": rows,
    }


def main() -> None:
    """Entry point of ``python cli.py``."""
    app()


if __name__ == "__main__":
    main()
