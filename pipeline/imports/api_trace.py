"""API traces: JSON lines of {request, response}, or of responses alone, as chat APIs and scoring servers write them.

``api_trace_line.py`` bounds and checks what is read, ``api_trace_rows.py`` and ``api_trace_choices.py`` know the forms,
``api_trace_tokens.py`` finds the ids, ``api_trace_samples.py`` makes the samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from xtoken.pipeline.chats import open_ids_model
from xtoken.pipeline.imports.api_trace_choices import BLAMELESS, Exchange
from xtoken.pipeline.imports.api_trace_line import MOST_ENTRIES, line_ends, lines
from xtoken.pipeline.imports.api_trace_samples import SampleMaker
from xtoken.pipeline.imports.api_trace_tokens import TokenIds
from xtoken.pipeline.imports.conversations import Chats, has_template
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.parquet_rows import SourceFile, list_files
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Slice, Source
from xtoken.schemas.chat import Answering
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import open_url

_SUFFIXES = (".jsonl",)
_LOOKED = 32  # lines that say how answers were sampled
_MOST_COUNT = 1 << 24
_HINT = "ask the server at temperature 1 and for its own log-probabilities, without grammar or penalties"
_NO_PROMPT = (
    "Samples are answers without what was asked, which the teacher saw: the requests are not in the trace, or the "
    "tokenizer has no chat template."
)
_NOT_DRAWN = (
    "Answers were not all drawn at temperature 1 from whole distributions, so how often tokens occur says nothing of "
    "the rows: the test of calibration is left out."
)


def guess_form(config: ImportConfig) -> str | None:
    """What the first line says: "messages" where it holds a conversation that the tokenizer's template can render;
    None: the samples must say.

    Raises:
        XtokenError: no file is there, or the first line is no trace.
    """
    first = _firsts(list_files(config.paths, _SUFFIXES), 1, skips=config.on_bad == "skip")[0]
    return "messages" if first.messages is not None and has_template(config.tokenizer) else None


def open_reader(config: ImportConfig, spelling: Spelling, form: str) -> "ApiTraces":
    """Look at the first lines, of which the first says what the samples are.

    Args:
        config: the run's.
        spelling: of its tokenizer.
        form: messages, ids or text.

    Raises:
        XtokenError: no file is there, a first line is no trace, or there is no template for messages.
    """
    files = list_files(config.paths, _SUFFIXES)
    firsts = _firsts(files, _LOOKED, skips=config.on_bad == "skip")
    first = firsts[0]
    chats = _chats(config, first, form)
    model = open_ids_model(config.tokenizer) if chats is None else chats.model
    drawn = first.scored or all(one.drawn_plainly for one in firsts)
    notes = (_NO_PROMPT,) if form != "messages" and not first.scored else ()
    source = Source(
        format="api-trace prompt" if first.scored else "api-trace chat",
        files=tuple(one.path for one in files),
        rest="exact",
        config={"server": "vllm" if first.reports_raw else "unknown"},
        k=MOST_ENTRIES,
        chat=None if chats is None else chats.info,
        notes=notes if drawn else (*notes, _NOT_DRAWN),
        hint=_HINT,
        calibrated=drawn,
        blameless=BLAMELESS,
    )
    maker = SampleMaker(model, spelling, TokenIds(model), scored=first.scored, form=form, max_tokens=config.max_tokens)
    assert model.tokenizer.table.info.hash == spelling.table.info.hash, "one tokenizer, opened twice"
    return ApiTraces(source, files, maker, config.part_bytes, skips=config.on_bad == "skip")


@dataclass(frozen=True)
class ApiTraces:
    """Traces, line by line; see ``xtoken.pipeline.imports.samples.Reader``.

    Attributes:
        files: with the names that samples begin with.
        maker: of samples.
        part_bytes: of a slice.
        skips: whether damaged lines are left out.
    """

    source: Source
    files: list[SourceFile]
    maker: SampleMaker
    part_bytes: int
    skips: bool = False
    shift: int = 0

    def slices(self) -> Sequence[Slice]:
        """Runs of lines of about ``part_bytes``.

        Raises:
            XtokenError: a line is too long, or a file cannot be read.
        """
        found = []
        for number, one in enumerate(self.files):
            start, at = 0, 0
            with open_url(one.path) as file:
                for stop, end in line_ends(file, one.name, self.part_bytes):
                    found.append(Slice(number, start, stop, at))
                    start, at = stop, end
        return found

    def read(self, wanted: Slice) -> Iterator[ImportedSample | LeftOut]:
        """The samples of a run of lines.

        Raises:
            XtokenError: a line is damaged; the message names file and line.
        """
        name = self.files[wanted.file].name
        with open_url(self.files[wanted.file].path) as file:
            file.seek(wanted.at)
            for line, data in lines(file, name, wanted.start, wanted.stop):
                place = f"{name}:{line.at}"
                try:
                    yield from list(self.maker.samples(Exchange.of(line.parse(data), line), place))
                except XtokenError as error:
                    if not self.skips:
                        raise
                    yield LeftOut(f"{place}.0", "a damaged line", str(error))

    def moved(self, by: int) -> None:
        """Nothing: an entry names the token that it predicts."""


def _firsts(files: Sequence[SourceFile], count: int, *, skips: bool) -> list[Exchange]:
    """The first lines of all files.

    Args:
        files: in order.
        count: at most so many.
        skips: leave out damaged ones.

    Raises:
        XtokenError: there is none, or one is damaged.
    """
    found: list[Exchange] = []
    for one in files:
        with open_url(one.path) as file:
            for line, data in lines(file, one.name, 0, None):
                if len(found) == count:
                    break
                try:
                    found.append(Exchange.of(line.parse(data), line))
                except XtokenError:
                    if not skips:
                        raise
        if len(found) == count:
            break
    if not found:
        raise XtokenError(f"{files[0].path} holds no line that can be read; name the files of the trace")
    return found


def _chats(config: ImportConfig, first: Exchange, form: str) -> Chats | None:
    """How conversations, or token ids, are read; None: text.

    Raises:
        XtokenError: there is no template for messages.
    """
    if form == "text":
        return None
    if form == "ids":
        return Chats.of_ids(config)
    chats = Chats.of_messages(config, "all" if first.scored else "last")
    answering = None if first.scored else _answering(first)
    return replace(chats, info=chats.info.model_copy(update={"answering": answering}))


def _answering(first: Exchange) -> Answering:
    """How the answers were asked for, as the first request says; what it does not say is the API's default."""
    asked, line = first.request, first.line
    most = asked.get("max_completion_tokens", asked.get("max_tokens"))
    return Answering(
        tokens=min(_MOST_COUNT, line.count(most, "max_tokens") or _MOST_COUNT),
        temperature=line.number(asked.get("temperature"), "temperature", 1.0, most=100.0),
        top_p=line.number(asked.get("top_p"), "top_p", 1.0, most=1.0) or 1.0,
        samples=min(_MOST_COUNT, line.count(asked.get("n"), "n") or 1),
        seed=line.whole(asked.get("seed"), "seed") % (1 << 63),
    )
