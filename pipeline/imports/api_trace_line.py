"""Lines of an API trace: of bounded length, JSON, and looked at before anything is made of them."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import IO, Any, NoReturn

from xtoken.pipeline.chats.refused import shown
from xtoken.schemas.errors import XtokenError

MOST_LINE = 1 << 26  # bytes; a prompt of 32,768 tokens with 20 entries each has some 40 million
MOST_TOKENS, MOST_ENTRIES, MOST_BYTES, MOST_CHOICES = 1 << 17, 4096, 1024, 1024
MOST_ID = (1 << 31) - 1
"""Of a token, and the largest rank that one can have."""
UNKNOWN = -9999.0
"""What servers write in the place of a log-probability that they do not know, or that is minus infinity."""
_FARTHEST = sys.float_info.max  # whole numbers of JSON have no end
_ABOVE = 1e-5  # nats above 0 that float32 rounding can leave
_BOM = b"\xef\xbb\xbf"
_FIX = "write the trace again as the server sent it, or remove the line"


@dataclass(frozen=True)
class Line:
    """A place in a file, for messages: ``at`` counts from 0, people are told from 1."""

    file: str
    at: int

    def bad(self, what: str, value: object, rule: str, fix: str = _FIX) -> NoReturn:
        """Refuse a value.

        Raises:
            XtokenError: always; it names file, line, value, rule and way out.
        """
        raise XtokenError(f"{self.file}, line {self.at + 1}: {what} is {shown(value)}, but {rule}; {fix}")

    def parse(self, data: bytes) -> dict[str, Any]:
        """The JSON object of a line.

        Raises:
            XtokenError: it is none.
        """
        try:
            value = json.loads(data.removeprefix(_BOM) if self.at == 0 else data, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise XtokenError(f"{self.file}, line {self.at + 1} is not JSON ({str(error)[:200]}); {_FIX}") from error
        if not isinstance(value, dict):
            self.bad("the line", value, "it must be a JSON object, {request, response} or a response")
        return value

    def record(self, value: Any, what: str) -> Mapping[str, Any]:
        """A JSON object."""
        if not isinstance(value, Mapping):
            self.bad(what, value, "it must be an object")
        return value

    def array(self, value: Any, what: str, most: int) -> list[Any]:
        """A JSON array of at most ``most``."""
        if not isinstance(value, list):
            self.bad(what, value, "it must be a list")
        if len(value) > most:
            self.bad(f"the length of {what}", len(value), f"at most {most:,} are read")
        return value

    def text(self, value: Any, what: str) -> str | None:
        """Text or null, without lone surrogates."""
        if value is None:
            return None
        if not isinstance(value, str):
            self.bad(what, value, "it must be text")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.bad(what, value, "it holds half a character")
        return value

    def logprob(self, value: Any, what: str) -> float:
        """A log-probability in nats; NaN where the server says that it does not know."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_FARTHEST <= value <= _FARTHEST:
            self.bad(what, value, "a log-probability is a finite number")
        if value > _ABOVE:
            self.bad(what, value, "a log-probability is at most 0")
        return math.nan if value <= UNKNOWN else min(0.0, float(value))

    def token_id(self, value: Any, what: str) -> int:
        """A token id, as a number or, being a key, as its digits."""
        if isinstance(value, str) and 0 < len(value) <= 10 and value.isascii() and value.isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_ID:
            self.bad(what, value, f"a token id is a whole number from 0 to {MOST_ID}")
        return value

    def token_ids(self, value: Any, what: str) -> list[int]:
        """A list of token ids."""
        return [self.token_id(one, f"{what}[{at}]") for at, one in enumerate(self.array(value, what, MOST_TOKENS))]

    def token_bytes(self, value: Any, what: str) -> bytes:
        """The bytes of a token; null is none."""
        try:
            return b"" if value is None else bytes(self.array(value, what, MOST_BYTES))
        except (TypeError, ValueError):
            self.bad(what, value, "bytes are whole numbers from 0 to 255")

    def number(self, value: Any, what: str, default: float, *, most: float) -> float:
        """A number from 0 to ``most``; null is the default."""
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            self.bad(what, value, f"it must be a number from 0 to {most:g}")
        return float(value)

    def whole(self, value: Any, what: str) -> int:
        """A whole number; null is 0."""
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int):
            self.bad(what, value, "it must be a whole number")
        return value

    def count(self, value: Any, what: str, most: int | None = None) -> int:
        """A whole number of at least 0, perhaps at most ``most``; null is 0."""
        found = self.whole(value, what)
        if found < 0 or (most is not None and found > most):
            self.bad(
                what, value, f"it must be a whole number {'of at least 0' if most is None else f'from 0 to {most}'}"
            )
        return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def lines(file: IO[bytes], name: str, start: int, stop: int | None) -> Iterator[tuple[Line, bytes]]:
    """Lines ``start`` to ``stop``, blank ones left out.

    Args:
        file: at the beginning of line ``start``.
        name: of the file, for messages.
        start, stop: from 0; None: to the end of the file.

    Raises:
        XtokenError: a line is too long.
    """
    for number in count(start) if stop is None else range(start, stop):
        data = file.readline(MOST_LINE + 1)
        if not data:
            return
        if len(data) > MOST_LINE:
            Line(name, number).bad("the length of the line", len(data), f"at most {MOST_LINE:,} bytes are read")
        if data.strip():
            yield Line(name, number), data


def line_ends(file: IO[bytes], name: str, least: int) -> Iterator[tuple[int, int]]:
    """Where a file may be cut: (lines, bytes) up to the first line end after every ``least`` bytes, and to its end.

    Raises:
        XtokenError: a line is too long.
    """
    number, at, cut = 0, 0, 0
    while data := file.readline(MOST_LINE + 1):
        if len(data) > MOST_LINE:
            Line(name, number).bad("the length of the line", len(data), f"at most {MOST_LINE:,} bytes are read")
        number, at = number + 1, at + len(data)
        if at - cut >= least:
            yield number, at
            cut = at
    if at > cut:
        yield number, at
