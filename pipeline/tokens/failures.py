"""Why a text has no tokens, and what the tokenizers library raises as an error that names the tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager

from xtoken.schemas.errors import XtokenError


class CannotTokenize(XtokenError):
    """A tokenizer cannot represent a text.

    Attributes:
        rule: what the text breaks, in few words that are the same for every such text.
    """

    def __init__(self, message: str, *, rule: str = "") -> None:
        """Carry both."""
        super().__init__(message)
        self.rule = rule


@contextmanager
def named_failures(what: str, way_out: str) -> Iterator[None]:
    """Turn what the library raises inside into an XtokenError: bare exceptions, and panics of its Rust code.

    Args:
        what: the tokenizer, and what was asked of it.
        way_out: for the user.
    """
    try:
        yield
    except XtokenError:
        raise
    except BaseException as error:
        # a panic is no Exception, so that nobody goes on after one by accident
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise XtokenError(f"{what} ({said}); {way_out}") from error
