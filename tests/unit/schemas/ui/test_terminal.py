"""Standard streams that are closed, broken, full or without our signs; as processes have them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xtoken.schemas.ui import terminal
from xtoken.schemas.ui.terminal import speaks_utf8

ROOT = Path(terminal.__file__).parents[2]
HEAD = """
import sys
from rich.table import Table
from xtoken.schemas.ui.answer import Answer
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Bars
from xtoken.schemas.ui.terminal import open_streams, read_input, remarks

open_streams()
table = Table("a sign")
table.add_row("Größe 中文 🙂")
answer = lambda as_json: Answer(as_json, False, lambda figures: [table, *figures.values()])
"""


def run(code: str, *redirections: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run code in a process of its own, its streams redirected as a shell does."""
    words = ["bash", "-c", f'exec "$0" -c "$1" {" ".join(redirections)}', sys.executable, HEAD + code]
    given = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "PYTHONIOENCODING": "utf-8", **env}
    return subprocess.run(words, env=given, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_signs_that_an_encoding_lacks(encoding: str) -> None:
    code = """
figures = {"text": "Größe 中文 🙂", "name": "\\udcff"}
assert answer(False).show(figures) and answer(True).show(figures)
answer(False).complain(XtokenError("Größe 中文"))
"""
    done = run(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    *shown, line = done.stdout.decode(encoding).splitlines()
    assert "?? ?" in "".join(shown)
    assert line == r'{"text": "Gr\u00f6\u00dfe \u4e2d\u6587 \ud83d\ude42", "name": "\udcff"}'
    assert done.stderr.decode(encoding).endswith(("Größe ??\n", "Gr??e ??\n"))


def test_utf8_stays_what_it_is() -> None:
    done = run('answer(True).show({"text": "中文 \\udcff"})')
    assert done.stdout.decode() == '{"text": "中文 \\udcff"}\n', "a broken sign is escaped as JSON has it"


CALLS = """
assert answer(False).show({"n": "1"}) == READS
answer(True).show({"n": 1})
bars = Bars(False)
bars.start("work", 10, "things")
bars.spoke -= 60
bars.advance(1)
bars.finish()
answer(True).complain(XtokenError("wrong"))
print("a library's words"), print("and more", file=sys.stderr)
opened = open("/dev/null")
assert opened.fileno() > 2, "a file of ours must not get what others print"
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    done = run(CALLS.replace("READS", "True"), closed)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("broken", ["1", "2"])
def test_a_reader_that_wants_no_more(broken: str) -> None:
    """``| head``: what follows goes nowhere, and no work ends of it."""
    code = CALLS.replace("READS", "False" if broken == "1" else "True").replace(
        "assert opened", "assert True or opened"
    )
    code = f"import os\nend, other = os.pipe()\nos.dup2(other, {broken})\nos.close(other)\nos.close(end)\n{code}"
    done = run(code)
    assert (done.returncode, b"Traceback" in done.stderr, b"ignored" in done.stderr) == (0, False, False), done.stderr


def test_a_full_disk_is_an_error_for_the_answer_alone() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    code = """
try:
    answer(True).show({"n": 1})
except XtokenError as error:
    answer(True).complain(error)
"""
    done = run(code, "> /dev/full")
    assert done.returncode == 0, done.stderr
    assert b"standard output cannot be written (No space left on device)" in done.stderr
    assert run(CALLS.replace("READS", "True"), "2> /dev/full").returncode == 0


@pytest.mark.parametrize("columns", ["0", "00", ""])
def test_a_terminal_without_width(columns: str) -> None:
    assert "Größe" in run('answer(False).show({"n": "1"})', COLUMNS=columns, TERM="dumb", NO_COLOR="1").stdout.decode()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("<&-", "standard input is empty"),
        ("< /dev/null", "standard input is empty"),
        ("<<< $'\\xff'", "the query cannot be read from standard input"),
    ],
)
def test_input_that_is_none(given: str, said: str) -> None:
    done = run('read_input("the query")', given, PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 1
    assert f"XtokenError: {said}" in done.stderr.decode()


def test_a_bar_on_a_terminal_prints_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar puts a stand-in before standard error, which prints through the console that writes there."""
    import pty

    ours, theirs = pty.openpty()
    code = """
bars = Bars(False)
bars.start("work", 10, "things")
print("a line of a library", file=sys.stderr)
remarks().print("a remark")
bars.advance(10)
bars.finish()
"""
    words = [sys.executable, "-c", HEAD + code]
    env = {**os.environ, "PYTHONPATH": str(ROOT / ".dev"), "TERM": "xterm"}
    done = subprocess.run(words, env=env, stderr=theirs, stdout=subprocess.DEVNULL, check=False)
    os.close(theirs)
    said = read_all(ours)
    assert done.returncode == 0, said
    assert said.count(b"a line of a library") == 1
    assert said.count(b"a remark") == 1
    assert b"work" in said


def read_all(descriptor: int) -> bytes:
    """What a terminal was told, to its end."""
    said = b""
    try:
        while block := os.read(descriptor, 4096):
            said += block
    except OSError:  # how Linux says that nobody has the other end open
        pass
    os.close(descriptor)
    return said


def test_what_speaks_utf8() -> None:
    class Stream:
        encoding: Any

    for encoding, speaks in (("UTF-8", True), ("utf8", True), ("ascii", False), (None, False), ("nonsense", False)):
        stream = Stream()
        stream.encoding = encoding
        assert speaks_utf8(stream) == speaks
    assert not speaks_utf8(object())
