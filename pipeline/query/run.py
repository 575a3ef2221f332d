"""One query: a session of DuckDB in memory with the views that it names, and nothing else open.

The session spills nothing to disk, loads no extension, and runs one statement that reads. What that statement reads is
up to who wrote it: files of their own are how they join what they know.
"""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import Any

from xtoken.pipeline.query.folders import CaptureFolder, TargetsFolder, refuse_other_capture, register
from xtoken.pipeline.query.functions import functions
from xtoken.pipeline.query.output import refuse_other_suffix, shown_rows, write_rows
from xtoken.pipeline.query.views import Catalog, sql
from xtoken.schemas.configs.artifacts import QueryConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_any_manifest

_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "temp_directory": "",
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
}
_READING = ("SELECT", "EXPLAIN", "MULTI")  # MULTI is PIVOT
_OF_DUCKDB = re.compile(r"[A-Z][\w ]* Error: ")
_INTERRUPTED = "INTERRUPT Error"
_MOMENT = 0.1  # seconds
_LINES = 4  # of a message of DuckDB's; the rest is memory advice and hints of its own


@dataclass(frozen=True)
class Asked:
    """Folders and what may be asked of them."""

    folders: tuple[CaptureFolder | TargetsFolder, ...]
    catalog: Catalog

    @property
    def notes(self) -> list[str]:
        """What is null, and why."""
        return [note for folder in self.folders for note in folder.notes()]


def query(config: QueryConfig) -> dict[str, Any]:
    """Answer a query, or list what may be asked.

    Returns:
        Without SQL ``views``; for the bare name of a view its ``columns``; else ``total`` rows and the first ones as
        ``rows``, or with ``out`` where they are.

    Raises:
        XtokenError: the folder holds neither a capture nor targets, the SQL fails, or the memory does not suffice.
        VerificationError: a file that the query reads is damaged.
    """
    refuse_other_suffix(config.out)
    with ExitStack() as stack:
        asked = opened(config, stack)
        text = (config.sql or "").strip().rstrip(";").strip()
        if not text:
            return _listing(config, asked)
        if asked.catalog.knows(text):
            return asked.catalog.described(text)
        with _named_errors(config, asked), stack.enter_context(session(config)) as connection:
            prepare(connection, asked, text)
            _refuse_writing(connection, text)
            return _interruptible(connection, partial(_answer, connection, text, config.out))


def _answer(connection: Any, text: str, out: str | None) -> dict[str, Any]:
    answer = connection.sql(text)
    if answer is None:
        raise XtokenError("the query gives no rows; write SELECT ...")
    return shown_rows(answer) if out is None else write_rows(connection, answer, out)


def _interruptible(connection: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work in a thread: DuckDB does not look for Ctrl-C while it runs, so whoever waits does."""
    outcome: Future[dict[str, Any]] = Future()
    given_up = Event()
    thread = Thread(target=_fulfil, args=(outcome, work, given_up), daemon=True)
    try:
        thread.start()
        # A look every moment: a signal that another thread receives does not wake one that waits for a lock.
        while not wait([outcome], timeout=_MOMENT).done:
            pass
        return outcome.result()
    except KeyboardInterrupt:
        given_up.set()  # a thread that is only starting does not count as alive yet, and then does nothing
        while thread.is_alive():  # a query that is only being planned does not hear it
            connection.interrupt()
            thread.join(_MOMENT)
        raise


def _fulfil(outcome: "Future[dict[str, Any]]", work: Callable[[], dict[str, Any]], given_up: Event) -> None:
    if given_up.is_set():
        return
    try:
        outcome.set_result(work())
    except BaseException as error:
        outcome.set_exception(error)


def opened(config: QueryConfig, stack: ExitStack) -> Asked:
    """The folders of a configuration and their views; no part is opened yet.

    Args:
        stack: what parts are kept open on.

    Raises:
        XtokenError: another kind of folder, ``capture`` beside a capture, or one that the targets are not of.
    """
    manifest = read_any_manifest(config.path)
    if isinstance(manifest, CaptureManifest):
        if config.capture is not None:
            raise XtokenError(f"{config.path} is a capture itself; --capture goes with targets: leave it out")
        source = CaptureFolder(config.path, stack)
        return Asked((source,), Catalog.of(["capture"], source.held(), source.reasons(), "", source.views()))
    if not isinstance(manifest, TargetManifest):
        raise XtokenError(f"{config.path} holds a {manifest.kind}; ask a capture, or targets, which hold W too")
    targets = TargetsFolder(config.path, stack)
    if config.capture is None:
        return Asked((targets,), Catalog.of(["targets", "joined"], targets.held(), targets.reasons(), ""))
    source = CaptureFolder(config.capture, stack)
    refuse_other_capture(targets, source)
    held, reasons = targets.held() | source.held(), targets.reasons() | source.reasons()
    catalog = Catalog.of(["targets", "joined", "capture"], held, reasons, "teacher_", source.views())
    return Asked((targets, source), catalog)


def session(config: QueryConfig) -> Any:
    """DuckDB in memory, to be closed."""
    import duckdb

    settings = {**_SETTINGS, "memory_limit": config.memory_limit, "threads": len(os.sched_getaffinity(0))}
    return duckdb.connect(config=settings)


def prepare(connection: Any, asked: Asked, text: str) -> None:
    """Make the views that a query names, and what they stand on.

    Raises:
        VerificationError, XtokenError: see ``query``.
    """
    connection.execute("CREATE SCHEMA capture; CREATE SCHEMA targets; CREATE SCHEMA joined")
    for name, function in functions().items():
        register(connection, name, function)
    connection.execute(sql("macros"))
    bases = {name: base for folder in asked.folders for name, base in folder.bases().items()}
    catalog = asked.catalog
    for name in catalog.closure(catalog.mentioned(text)):
        if name in bases:
            bases[name](connection)
        else:
            view = catalog.views[name]
            connection.execute(f"CREATE VIEW {name} AS {view.text}")
            if view.listed:
                connection.execute(f"CREATE VIEW {catalog.public(name)} AS FROM {name}")
    connection.execute("SET lock_configuration = true")


def _refuse_writing(connection: Any, text: str) -> None:
    """Raise XtokenError unless the text is one statement that reads."""
    kinds = [str(statement.type).rpartition(".")[2] for statement in connection.extract_statements(text)]
    if len(kinds) != 1:
        raise XtokenError(f"the query is {len(kinds)} statements; ask one at a time")
    if kinds[0] not in _READING:
        raise XtokenError(
            f"a query reads, and this is {kinds[0]}; write SELECT ..., and give --out FILE to keep the rows"
        )


def _listing(config: QueryConfig, asked: Asked) -> dict[str, Any]:
    catalog = asked.catalog
    listing: dict[str, Any] = {"path": config.path, "views": catalog.rows()}
    if missing := catalog.missing():
        listing["not_here"] = missing
    if asked.notes:
        listing["notes"] = [{"note": note} for note in asked.notes]
    first = next(iter(catalog.listed))
    listing["next"] = (
        f"'xtoken query DIR {first}' says what the columns of {first} mean; docs/query.md has questions to ask"
    )
    return listing


@contextmanager
def _named_errors(config: QueryConfig, asked: Asked) -> Iterator[None]:
    """What DuckDB raises, as errors of ours with the way out."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        if KeyboardInterrupt.__name__ in str(error):  # it came while a function of ours ran
            raise KeyboardInterrupt from error
        raise _named(str(error), isinstance(error, duckdb.OutOfMemoryException), config, asked) from error
    except OSError as error:
        # what fails while rows stream comes through Arrow, with DuckDB's message
        said = str(error)
        if _INTERRUPTED in said or KeyboardInterrupt.__name__ in said:
            raise KeyboardInterrupt from error
        if _OF_DUCKDB.match(said) is None:
            raise
        raise _named(said, said.startswith("Out of Memory"), config, asked) from error


def _named(said: str, memory: bool, config: QueryConfig, asked: Asked) -> XtokenError:
    if memory:
        return XtokenError(
            f"the query does not fit --memory-limit {config.memory_limit}: give more, ask for fewer columns or "
            "samples, or sort and group less at once"
        )
    _, ours, why = said.rpartition(f"{VerificationError.__name__}: ")
    if ours:
        return VerificationError(f"{config.path}: {why.strip()}")
    for name, why in asked.catalog.lacking.items():
        if f"name {asked.catalog.public(name)} does not exist" in said:
            return XtokenError(f"{asked.catalog.public(name)} is not here: {why}")
    return _refused(said, asked)


def _refused(said: str, asked: Asked) -> XtokenError:
    lines = "\n".join(said.strip().splitlines()[:_LINES])
    names = ", ".join(asked.catalog.listed)
    return XtokenError(
        f"the query does not run: {lines}\nthe views are {names}; 'xtoken query DIR' says what is in them"
    )
