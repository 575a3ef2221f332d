"""The verbs of xtoken: parse, build the configuration, call, show. Nothing else lives here.

Every verb is declared by a configuration of ``xtoken.schemas.configs.artifacts``: its fields are the flags. This is
also the only place where the pipeline and the trainer meet.
"""

import contextlib
import functools
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from xtoken.schemas.configs.artifacts import (
    AlignConfig,
    DemoConfig,
    DoctorConfig,
    InspectConfig,
    ProjectConfig,
    QueryConfig,
    VerifyConfig,
)
from xtoken.schemas.configs.base import Config
from xtoken.schemas.configs.capture import ONLY, CorpusConfig, EstimateConfig, PrecomputeConfig, StatusConfig
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.configs.measure import EvalConfig, ReportConfig
from xtoken.schemas.configs.share import CardConfig, MergeConfig, PullConfig, PushConfig
from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.configs.transplant import TransplantConfig
from xtoken.schemas.errors import TRACEBACK, PartlyDone, XtokenError, named
from xtoken.schemas.io.cache_folders import settle_home
from xtoken.schemas.io.overlap import refuse_inside
from xtoken.schemas.io.paths import refuse_lost_folder
from xtoken.schemas.ui.answer import RANK, Answer, Interrupted
from xtoken.schemas.ui.doctor import EVERY, examine
from xtoken.schemas.ui.flags import App, build, build_each, command, config_option, options, words_of
from xtoken.schemas.ui.progress import Bars
from xtoken.schemas.ui.tables import shown
from xtoken.schemas.ui.terminal import Output, delivered, read_input, remarks

if TYPE_CHECKING:
    from xtoken.pipeline.chats.held_out import StudentChats
    from xtoken.pipeline.corpus import Document
    from xtoken.pipeline.tokens import TextTokenizer
    from xtoken.schemas.chat import ChatInfo
    from xtoken.trainer.evaluate import EvalSample


app = App(
    help="Distil from teachers that speak another tokenizer: capture the teacher once, train any student.\n\n"
    "The way: precompute -> align -> train. 'xtoken doctor' reports what is installed and what is missing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
share_app = typer.Typer(
    help="Publish, fetch, describe and join captures on any folder or object store.", no_args_is_help=True
)
app.add_typer(share_app, name="share")
Figures = dict[str, Any]
F = TypeVar("F", bound=Figures | Iterator[Figures])
Anyhow = Callable[[Any, Bars], Figures | Iterator[Figures]]


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"xtoken {version('xtoken')}\n")
        raise typer.Exit


VERSION_FLAG = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def _before(_: VERSION_FLAG = False) -> None: ...


def _guarded(work: Callable[[Answer, Bars], Figures | Iterator[Figures]], as_json: bool, quiet: bool) -> None:
    """Run a verb; turn whatever it raises into a message and an exit code."""
    answer, bars = Answer(as_json, quiet, shown), Bars(quiet or as_json or RANK != "0")
    try:
        found = work(answer, bars)
        for figures in [found] if isinstance(found, dict) else found:
            bars.finish()
            if not answer.show(figures):
                break
    except (Exception, KeyboardInterrupt) as error:
        bars.finish()
        if os.environ.get(TRACEBACK) and not isinstance(error, XtokenError):
            raise
        told = named(error) if isinstance(error, Exception) else Interrupted()
        answer.complain(told)
        raise typer.Exit(told.exit_code) from error


JSON_FLAG = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")]
QUIET_FLAG = Annotated[bool, typer.Option("--quiet", help="No progress.")]


class verb:  # noqa: N801 - used as a decorator
    """Register a function of (configuration, bars) as a verb whose flags are the configuration's fields.

    With ``repeat``, the flag of that name may be given again: the function then gets a list of configurations.
    ``hidden`` verbs work and are not listed: what they did has another command now.
    """

    def __init__(
        self,
        model: type[Config],
        example: str,
        group: typer.Typer = app,
        repeat: str | None = None,
        *,
        hidden: bool = False,
    ) -> None:
        self.model, self.example, self.group, self.repeat, self.hidden = model, example, group, repeat, hidden

    def __call__(self, function: Callable[[Any, Bars], F]) -> Callable[[Any, Bars], F]:
        once = functools.partial(build, self.model)
        make = once if self.repeat is None else functools.partial(build_each, self.model, repeat=self.repeat)
        run = functools.partial(_run_verb, function, make)
        text = f"{self.model.__doc__}\n\nExample: {self.example}"
        name = function.__name__.removeprefix("run_").removeprefix("share_")
        parameters = [*options(self.model, self.repeat), config_option(self.model, self.repeat)]
        switches = {"as_json": JSON_FLAG, "quiet": QUIET_FLAG}
        self.group.command(name, help=text, hidden=self.hidden)(command(run, parameters, switches))
        return function


def _run_verb(function: Anyhow, make: Callable[[Figures], Any], /, **values: Any) -> None:
    as_json, quiet, path = values.pop("as_json"), values.pop("quiet"), values.pop("config")
    _guarded(lambda answer, bars: function(_ready(_made(make, values, path), answer), bars), as_json, quiet)


def _made(make: Callable[[Figures], Any], values: Figures, path: str | None) -> Any:
    try:
        return make(values)
    except XtokenError as error:
        if path is None:
            raise
        raise XtokenError(f"{error} (what no flag gives is from --config {path})") from error


def _ready(made: Any, answer: Answer) -> Any:
    """One configuration or several, whose outputs can be written, in a process that can keep caches somewhere."""
    refuse_lost_folder()
    for config in made if isinstance(made, list) else [made]:
        config.refuse_unusable_outputs()
    answer.note(settle_home())
    return made


@verb(
    PrecomputeConfig,
    "xtoken precompute corpus.jsonl.zst --teacher Qwen/Qwen3-4B --backend vllm --out capture",
    repeat="teacher",
)
def run_precompute(configs: list[PrecomputeConfig], bars: Bars) -> Figures:
    """Capture a teacher's rows over a corpus, or those of several, one after the other."""
    from xtoken.pipeline.capture.multi_teacher import run_teachers

    return run_teachers(configs, bars)


@verb(StatusConfig, "xtoken status s3://team/capture --watch 10")
def run_status(config: StatusConfig, bars: Bars) -> Figures | Iterator[Figures]:  # noqa: ARG001
    """Say how a capture gets on."""
    from xtoken.pipeline.capture.monitor.status import status

    return status(config.path) if config.watch is None else _watched(config.path, config.watch)


def _watched(path: str, seconds: float) -> Iterator[Figures]:
    """Look again and again, on a terminal in the same place, until the run has ended."""
    from xtoken.pipeline.capture.monitor.status import goes_on, status

    with contextlib.suppress(KeyboardInterrupt):
        while True:
            figures = status(path)
            delivered(Output().clear)
            yield figures
            if not goes_on(figures):
                return
            time.sleep(seconds)


@verb(
    ImportConfig,
    "xtoken import distillkit data/ --tokenizer Qwen/Qwen3-4B --license corpus=odc-by,outputs=apache-2.0 --out capture",
)
def run_import(config: ImportConfig, bars: Bars) -> Figures:
    """Make a capture of a logit dataset of others."""
    from xtoken.pipeline.imports.run import import_dataset

    return import_dataset(config, bars)


@verb(ProjectConfig, "xtoken project --student HuggingFaceTB/SmolLM2-135M --teacher capture --out w")
def run_project(config: ProjectConfig, bars: Bars) -> Figures:
    """Build W and print its coverage."""
    from xtoken.pipeline.project import project

    manifest = project(config, bars)
    pair = {"student": manifest.student.name, "teacher": manifest.teacher.name, "rule": config.rule}
    return {**pair, **manifest.coverage, "page": f"{config.out.rstrip('/')}/coverage.html", "out": config.out}


@verb(AlignConfig, "xtoken align capture --student HuggingFaceTB/SmolLM2-135M --out targets --for p-kl,h-kl")
def run_align(config: AlignConfig, bars: Bars) -> Figures:
    """Align a capture, or several, with a student's tokenizer."""
    from xtoken.pipeline.align import run_captures

    return run_captures(config, bars)


@verb(TrainConfig, "xtoken train targets --student HuggingFaceTB/SmolLM2-135M --loss p-kl --out run")
def run_train(config: TrainConfig, bars: Bars) -> Figures:
    """Train a student from targets alone."""
    from xtoken.pipeline.chats.held_out import StudentChats
    from xtoken.pipeline.tokens import load_tokenizer, refuse_long_prefix
    from xtoken.schemas.manifest import TargetManifest, read_manifest
    from xtoken.trainer.loop import train

    student, report = config.student, config.report
    if report.eval_text:
        refuse_inside("--out", config.out, report.eval_text)
    tokenizer = load_tokenizer(student.tokenizer_source, trust_remote_code=student.trust_remote_code)
    refuse_long_prefix(tokenizer)
    info, samples = read_manifest(config.data.targets[0], TargetManifest).chat, []
    if info is None and student.template is not None:
        raise XtokenError(
            f"--template {student.template} is for conversations, and {config.data.targets[0]} holds plain text; leave "
            "it out"
        )
    rendered = _rendered(info)
    chats = StudentChats(student.tokenizer_source, rendered, student.template)
    if rendered is not None or student.template is not None:
        _ = chats.model  # refused here if its template is not the one that the targets were written with
    if report.eval_text:
        corpus = CorpusConfig(corpus=report.eval_text, id_field=report.eval_id_field, split=[ONLY])
        samples = eval_samples(corpus, tokenizer, config.data.max_tokens, chats)
    summary = train(config, tokenizer.table.info, samples, bars)
    return summary | ({"learned_w": _learned_w(config, summary["learned_w"])} if "learned_w" in summary else {})


def _learned_w(config: TrainConfig, files: list[Figures]) -> list[str]:
    """Projection folders of the weights that training left, which 'xtoken align --w' and 'xtoken inspect' read."""
    import numpy as np

    from xtoken.pipeline.project import write_learned

    folders = []
    for found in files:
        folders.append(found["file"].removesuffix(".npy"))
        weights = np.load(found["file"], allow_pickle=False)
        write_learned(config.data.targets[found["teacher"]], weights, folders[-1], config.out)
    return folders


@verb(
    TransplantConfig,
    "xtoken transplant HuggingFaceTB/SmolLM2-135M --tokenizer meta-llama/Llama-3.2-1B --out smollm2-llama3",
)
def run_transplant(config: TransplantConfig, bars: Bars) -> Figures:
    """Write a model under another tokenizer: the pipeline maps its tokens, the trainer makes the rows."""
    from xtoken.pipeline.project.new_tokenizer import open_tokenizers, plan_transplant, same_tokenizer
    from xtoken.trainer.transplant import (
        NewVocabulary,
        new_model_folder,
        open_old_model,
        put_tokenizer,
        transplant,
        write_report,
    )

    with new_model_folder(config) as folder:
        old, new = open_tokenizers(config)
        files = put_tokenizer(config, folder, old.table.info.adds_bos)
        plan = plan_transplant(config, old, new, files, folder)
        table = plan.new.table
        check = functools.partial(same_tokenizer, folder, plan.new)
        old_text = old.table.by_bytes() if config.expand_inputs else None
        vocabulary = NewVocabulary(table.info, table.id_of("pad"), plan.token_map, check, old_text)
        model = open_old_model(config.model, config.trust_remote_code)
        done = transplant(config, model, vocabulary, folder, bars)
        figures = {"model": config.model, **plan.figures, **done, "notes": [*plan.notes, *done["notes"]]}
        write_report(folder, figures)
    return {**figures, "out": config.out}


@app.command("losses")
def run_losses(as_json: JSON_FLAG = False, quiet: QUIET_FLAG = False) -> None:
    """List the losses: what each matches, what it needs stored, when to use it, where it comes from.

    Example: xtoken losses
    """
    from xtoken.trainer.losses import loss_rows

    _guarded(lambda *_: {"losses": loss_rows(as_json)}, as_json, quiet)


@verb(EvalConfig, "xtoken eval run/model --text held-out.jsonl --targets held-out-targets")
def run_eval(config: EvalConfig, bars: Bars) -> Figures:
    """Measure a model."""
    from xtoken.pipeline.chats.held_out import StudentChats
    from xtoken.pipeline.corpus import Corpus
    from xtoken.pipeline.tokens import load_tokenizer, refuse_long_prefix
    from xtoken.schemas.manifest import TargetManifest, read_manifest
    from xtoken.trainer.evaluate import evaluate

    if config.out is not None and config.text is not None:
        refuse_inside("--out", config.out, config.text)
    sources = [config.tokenizer or model for model in config.model]
    tokenizers = [load_tokenizer(source, trust_remote_code=config.trust_remote_code) for source in sources]
    for tokenizer in tokenizers:
        refuse_long_prefix(tokenizer)
    samples = []
    if config.text:
        names = {"text_field": config.text_field, "id_field": config.id_field}
        corpus = CorpusConfig(corpus=config.text, limit=config.limit, split=[ONLY], **names)
        if config.of_conversations and Corpus(corpus.changed(form="auto")).form is None:
            given = " and ".join(config.of_conversations)
            raise XtokenError(f"{given}: for conversations, and --text {config.text} holds plain text; leave it out")
        if config.combine == "bytes":
            return _eval_bytes(config, corpus, tokenizers, bars)
        info = _rendered(read_manifest(config.targets, TargetManifest).chat) if config.targets else None
        more: list[Any] = config.learn
        chats = StudentChats(sources[0], info, config.template, tuple(more), config.arguments, config.date)
        samples = eval_samples(corpus, tokenizers[0], config.max_tokens, chats)
    first, *others = [tokenizer.table.info for tokenizer in tokenizers]
    return dict(evaluate(config, first, samples, bars, others=others))


def _eval_bytes(config: EvalConfig, corpus: CorpusConfig, tokenizers: "list[TextTokenizer]", bars: Bars) -> Figures:
    """Measure models of any tokenizers by the next byte."""
    from xtoken.pipeline.corpus import Corpus
    from xtoken.pipeline.corpus.byte_windows import byte_windows
    from xtoken.pipeline.tokens.canonical import Canonical
    from xtoken.trainer.ensemble.measure import WINDOW, ByteModel, measure_bytes

    windows = list(byte_windows(Corpus(corpus).documents(), WINDOW, config.max_bytes or 1024))
    models = []
    for name, tokenizer in zip(config.model, tokenizers, strict=True):
        spelling, roles = Canonical(tokenizer), tokenizer.table.role
        spelling.refuse_unspelt({window.id: window.data for window in windows})
        ends = tuple(token for token, role in enumerate(roles) if role in ("eos", "eot"))
        models.append(ByteModel(name, tokenizer.table.info, spelling, ends))
    return measure_bytes(config, models, windows, bars)


def _rendered(info: "ChatInfo | None") -> "ChatInfo | None":
    """How a template wrote the conversations of targets; None of texts and of token ids, which none did."""
    return info if info is not None and info.template is not None else None


def eval_samples(
    config: CorpusConfig, tokenizer: "TextTokenizer", max_tokens: int, chats: "StudentChats"
) -> "list[EvalSample]":
    """Tokenize held-out data for the evaluator: windows cut as at capture, conversations as ``chats`` reads them."""
    from xtoken.pipeline.corpus import Corpus, windows
    from xtoken.trainer.evaluate import EvalSample

    corpus = Corpus(config.changed(form="auto"))
    if corpus.form == "ids":
        raise XtokenError(f"{config.corpus} holds token ids, and models are measured on texts or messages; give those")
    if corpus.form is not None:
        return _chat_samples(list(corpus.documents()), chats, max_tokens)
    samples = []
    for document in corpus.documents():
        for window in windows(document, tokenizer, max_tokens):
            encoded = window.encoded
            ends = encoded.ends
            samples.append(EvalSample(encoded.ids, int(ends[-1]), int(ends[0]), window.sample_id, document.source))
    return samples


def _chat_samples(talks: "list[Document]", chats: "StudentChats", max_tokens: int) -> "list[EvalSample]":
    """Conversations as the model's template writes them; what it cannot write, or is too long, is left out by name."""
    from xtoken.pipeline.chats import Refused, from_json
    from xtoken.trainer.evaluate import EvalSample, Question, TaughtSpan

    samples, left_out = [], []
    for talk in talks:
        try:
            found = chats.read(from_json(talk.text), max_tokens)
        except Refused as refused:
            left_out.append(f"{talk.id}: {refused}")
            continue
        taught = [TaughtSpan(*span) for span in found.taught]
        question = None if found.asked is None else Question(*found.asked)
        samples.append(EvalSample(found.ids, found.taught_bytes, 0, f"{talk.id}#0", talk.source, taught, question))
    if left_out and RANK == "0":
        logging.getLogger("xtoken").warning(
            "%d of %d held-out conversations are left out, such as %s", len(left_out), len(talks), left_out[0]
        )
    return samples


@verb(ReportConfig, "xtoken report run-p-kl run-ce --out report.html")
def run_report(config: ReportConfig, bars: Bars) -> Figures:  # noqa: ARG001
    """Draw runs as a page."""
    from xtoken.trainer.report.page import write_report

    return write_report(config)


@verb(InspectConfig, "xtoken inspect capture")
def run_inspect(config: InspectConfig, bars: Bars) -> Figures:  # noqa: ARG001
    """Say what a folder is, or draw a sample of it."""
    if config.html is not None:
        from xtoken.pipeline.page.sample_page import write_page

        return write_page(config)
    from xtoken.pipeline.store.inspect import inspect

    return inspect(config.path)


@verb(QueryConfig, "xtoken query targets 'FROM disagreements LIMIT 20'")
def run_query(config: QueryConfig, bars: Bars) -> Figures:  # noqa: ARG001
    """Ask a capture or targets."""
    from xtoken.pipeline.query import query

    return query(config.model_copy(update={"sql": read_input("the query")}) if config.sql == "-" else config)


@verb(VerifyConfig, "xtoken verify s3://team/capture")
def run_verify(config: VerifyConfig, bars: Bars) -> Figures:
    """Check every byte."""
    from xtoken.pipeline.store.verify import verify

    bars.start("verify", None, "bytes")
    return {"verified": "every file is as its manifest says", **verify(config.path, bars.advance, audit=config.audit)}


@verb(PushConfig, "xtoken share push capture s3://team/capture --license corpus=cc-by-4.0,outputs=gemma", share_app)
def run_share_push(config: PushConfig, bars: Bars) -> Figures:
    """Publish a capture with its card."""
    from xtoken.pipeline.share.push_pull import push

    return push(config, bars)


@verb(PullConfig, "xtoken share pull s3://team/capture capture --parts 0-9", share_app)
def run_share_pull(config: PullConfig, bars: Bars) -> Figures:
    """Fetch a capture."""
    from xtoken.pipeline.share.push_pull import pull

    return pull(config, bars)


@verb(CardConfig, "xtoken share card capture --license corpus=cc-by-4.0,outputs=gemma", share_app)
def run_share_card(config: CardConfig, bars: Bars) -> Figures:
    """Write a capture's dataset card."""
    from xtoken.pipeline.share.card.card import write_card

    return write_card(config, bars)


@verb(MergeConfig, "xtoken share merge capture-a,capture-b joined", share_app)
def run_share_merge(config: MergeConfig, bars: Bars) -> Figures:
    """Join captures."""
    from xtoken.pipeline.share.merge import merge

    return merge(config, bars)


@verb(DoctorConfig, "xtoken doctor")
def run_doctor(config: DoctorConfig, bars: Bars) -> Figures:  # noqa: ARG001
    """Report what is installed and what is missing."""
    figures = examine(online=config.online, imports=EVERY if config.imports else ())
    if figures["problems"]:
        said = "\n".join(figures["problems"])
        raise PartlyDone(f"what every verb needs is missing or broken:\n{said}", figures, exit_code=1)
    return figures


def _replaced(words: list[str], was: str) -> None:
    """One line of a verb that the next release is without: the command that does the same."""
    if RANK == "0":
        line = f"note: '{was}' will be gone in 0.7.0; the same is: {shlex.join(words)}"
        remarks(soft_wrap=True).out(line, highlight=False)


@verb(EstimateConfig, "xtoken estimate corpus.jsonl.zst --teacher Qwen/Qwen3-4B --k 32", hidden=True)
def run_estimate(config: EstimateConfig, bars: Bars) -> Figures:
    """What a capture will cost."""
    plan = PrecomputeConfig.from_flat(**config.to_flat(), dry_run=True, pilot=True)
    _replaced(["xtoken", "precompute", *words_of(plan)], "xtoken estimate")
    return run_precompute([plan], bars)


@verb(VerifyConfig, "xtoken share verify s3://team/capture", share_app, hidden=True)
def run_share_verify(config: VerifyConfig, bars: Bars) -> Figures:
    """Check every byte."""
    _replaced(["xtoken", "verify", *words_of(config)], "xtoken share verify")
    return run_verify(config, bars)


@verb(DemoConfig, "xtoken demo --out demo-run", hidden=True)
def run_demo(config: DemoConfig, bars: Bars) -> Figures:
    """Run examples/demo.py."""
    script = Path(__file__).resolve().parent / "examples" / "demo.py"
    if not script.is_file():
        raise XtokenError("the demo is examples/demo.py of the repository: clone it and say 'make demo'")
    words = [os.path.relpath(script), *words_of(config)]
    _replaced(["python", *words], "xtoken demo")
    quiet = ["--quiet"] if bars.quiet else []
    done = subprocess.run([sys.executable, *words, *quiet, "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise XtokenError(f"the demo ended with exit code {done.returncode}; what it said stands above")
    return dict(json.loads(done.stdout))


def main() -> None:
    """Entry point of ``python cli.py``."""
    app()


if __name__ == "__main__":
    main()
