"""API traces: JSON lines of {request, response}, or of responses alone, as chat APIs and scoring servers write them.

``api_trace_line.py`` bounds and checks what is read, ``api_trace_rows.py`` and ``api_trace_choices.py`` know the forms,
``api_trace_tokens.py`` finds the ids, ``api_trace_samples.py`` makes the samples.
"""

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from xtoken.pipeline.chats import LEARNED, ChatModel, NoTemplate, open_chat_model, open_ids_model
from xtoken.pipeline.imports.api_trace_choices import Exchange
from xtoken.pipeline.imports.api_trace_line import MOST_ENTRIES, line_ends, lines
from xtoken.pipeline.imports.api_trace_samples import SampleMaker
from xtoken.pipeline.imports.api_trace_tokens import TokenIds
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Slice, Source
from xtoken.pipeline.tokens.table import TokenTable
from xtoken.schemas.chat import Answering, CaptureChat
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import named_errors, open_filesystem, open_url

_SUFFIX = ".jsonl"
_LAST_DAY = 4_102_444_800  # seconds; what a server says later than 2100 is no time
_MOST_COUNT = 1 << 24
_NO_PROMPT = (
    "Samples are answers without what was asked, which the teacher saw: the requests are not in the trace, or the "
    "tokenizer has no chat template."
)


def open_reader(config: ImportConfig, table: TokenTable) -> "ApiTraces":
    """Look at the first line, which says what the samples are.

    Args:
        config: the run's.
        table: of its tokenizer.

    Raises:
        XtokenError: no file is there, or the first line is no trace.
    """
    files = _files(config.paths)
    first = _first(files)
    model = _model(config.tokenizer, first)
    kind = "prompt" if first.scored else "chat"
    rendered = first.messages is not None and bool(model.template.sources)
    chat = _chat(model, first) if rendered else None
    source = Source(
        format=f"api-trace {kind}",
        files=tuple(files),
        rest="exact",
        config={"kind": kind, "server": "vllm" if first.reports_raw else "unknown"},
        k=MOST_ENTRIES,
        chat=chat,
        notes=() if rendered or first.scored else (_NO_PROMPT,),
    )
    maker = SampleMaker(model, TokenIds(model), scored=first.scored, rendered=rendered)
    assert model.tokenizer.table.info.hash == table.info.hash, "one tokenizer, opened twice"
    return ApiTraces(source, maker, config.part_bytes)


@dataclass(frozen=True)
class ApiTraces:
    """Traces, line by line; see ``xtoken.pipeline.imports.samples.Reader``."""

    source: Source
    maker: SampleMaker
    part_bytes: int
    shift: int = 0

    def slices(self) -> Sequence[Slice]:
        """Runs of lines of about ``part_bytes``.

        Raises:
            XtokenError: a line is too long, or a file cannot be read.
        """
        found = []
        for number, url in enumerate(self.source.files):
            start, at = 0, 0
            with open_url(url) as file:
                for stop, end in line_ends(file, posixpath.basename(url), self.part_bytes):
                    found.append(Slice(number, start, stop, at))
                    start, at = stop, end
        return found

    def read(self, wanted: Slice) -> Iterator[ImportedSample | LeftOut]:
        """The samples of a run of lines.

        Raises:
            XtokenError: a line is damaged; the message names file and line.
        """
        url = self.source.files[wanted.file]
        name = posixpath.basename(url)
        with open_url(url) as file:
            file.seek(wanted.at)
            for line, value in lines(file, name, wanted.start, wanted.stop):
                yield from self.maker.samples(Exchange.of(value, line), f"{name}:{line.at}")

    def moved(self, by: int) -> None:
        """Nothing: an entry names the token that it predicts."""


def _files(paths: Sequence[str]) -> list[str]:
    """The named files, and those of named folders by name.

    Raises:
        XtokenError: none is there, or two are called alike.
    """
    found: list[str] = []
    for path in paths:
        fs, root = open_filesystem(path)
        with named_errors(path):
            if fs.isdir(root):
                inside = sorted(name for name in fs.ls(root, detail=False) if name.endswith(_SUFFIX))
                found += [posixpath.join(path, posixpath.basename(name)) for name in inside]
            elif fs.isfile(root):
                found.append(path)
            else:
                raise XtokenError(f"{path} does not exist; name files of JSON lines, or folders of {_SUFFIX} files")
    if not found:
        raise XtokenError(f"{', '.join(paths)} holds no {_SUFFIX} file; name the files of the trace")
    names = Counter(map(posixpath.basename, found))
    if alike := [name for name, count in names.items() if count > 1]:
        raise XtokenError(
            f"{names[alike[0]]} files are called {alike[0]!r}, and samples are named after their file; rename all but "
            "one"
        )
    return found


def _first(files: Sequence[str]) -> Exchange:
    """The first line of all files.

    Raises:
        XtokenError: there is none.
    """
    for url in files:
        with open_url(url) as file:
            for line, value in lines(file, posixpath.basename(url), 0, None):
                return Exchange.of(value, line)
    raise XtokenError(f"{', '.join(files)[:200]} holds no line; name the files of the trace")


def _model(tokenizer: str, first: Exchange) -> ChatModel:
    """The tokenizer, with its chat template if it has one; templates are told the day of the first response."""
    try:
        return open_chat_model(tokenizer, date=datetime.fromisoformat(_day(first)))
    except NoTemplate:
        return open_ids_model(tokenizer)


def _day(first: Exchange) -> str:
    created = first.response.get("created")
    seconds = created if isinstance(created, int) and 0 <= created < _LAST_DAY else 0
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def _chat(model: ChatModel, first: Exchange) -> CaptureChat:
    return CaptureChat(
        template=model.template.sha256,
        date=_day(first),
        learn=sorted(LEARNED),
        stop_token=model.stop_token,
        form="messages",
        turns="all" if first.scored else "last",
        long="skip",
        answering=None if first.scored else _answering(first),
    )


def _answering(first: Exchange) -> Answering:
    """How the answers were asked for, as the first request says; what it does not say is the API's default."""
    asked, line = first.request, first.line
    most = asked.get("max_completion_tokens", asked.get("max_tokens"))
    return Answering(
        tokens=min(_MOST_COUNT, line.count(most, "max_tokens") or _MOST_COUNT),
        temperature=line.number(asked.get("temperature"), "temperature", 1.0, most=100.0),
        top_p=line.number(asked.get("top_p"), "top_p", 1.0, most=1.0) or 1.0,
        samples=min(_MOST_COUNT, line.count(asked.get("n"), "n") or 1),
        seed=line.count(asked.get("seed"), "seed") % (1 << 63),
    )
