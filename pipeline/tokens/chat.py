"""A tokenizer for conversations: what a chat template writes is read with added tokens, what people write without any.

Contents never become control tokens: the backend that reads them has no added tokens at all, since also those that are
not special (``<think>``, ``<tool_call>``) steer a model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xtoken.pipeline.tokens.byte_tokenizer import ByteTokenizer
from xtoken.pipeline.tokens.failures import CannotTokenize
from xtoken.pipeline.tokens.hf_tokenizer import HfTokenizer
from xtoken.pipeline.tokens.interface import Encoded
from xtoken.pipeline.tokens.rejoin import METASPACE
from xtoken.pipeline.tokens.spec import Spec
from xtoken.pipeline.tokens.table import TokenTable
from xtoken.schemas.errors import XtokenError

# What stands before a part of a rendering: nothing, an added token, or other text.
Place = Literal["start", "marker", "text"]
_MARK = "\ufdd0part\ufdd0"  # noncharacters, which text does not hold
_BLANKS = (METASPACE, "\u0120")  # how a token of a blank begins, of the two families
_LEADS: dict[Place, str] = {"start": "", "marker": _MARK, "text": f"{_MARK}\n"}


class ChatTokenizer:
    """Ids of the parts of a rendered conversation.

    Attributes:
        table: what its tokens mean; the same table as that of ``load_tokenizer``.
        added: id -> how it is spelt, of every added token.
    """

    def __init__(self, text: HfTokenizer | ByteTokenizer, marked: Any, spec: Spec | None) -> None:
        """Take both over.

        Args:
            text: reads contents; its backend has no added tokens.
            marked: a ``tokenizers.Tokenizer`` that finds every added token; None if there are none.
            spec: the tokenizer's.
        """
        self.table: TokenTable = text.table
        self.added: Mapping[int, str] = {}
        if spec is not None:
            self.added = {**text.controls, **{token: one.content for token, one in spec.added_ids.items()}}
        self._text = text
        self._contents = _Parts(text.backend) if isinstance(text, HfTokenizer) else None
        self._marked = _Parts(marked) if marked is not None else None

    @classmethod
    def of_bytes(cls, tokenizer: ByteTokenizer) -> "ChatTokenizer":
        """Bytes, for which a template has no markers."""
        return cls(tokenizer, None, None)

    def template_ids(self, text: str, place: Place) -> list[int]:
        """Ids of text that a template wrote; its markers are the tokens that they name.

        Args:
            text: it, whole, between two contents.
            place: what stands before it.
        """
        return self._marked.ids(text, place) if self._marked is not None else list(text.encode())

    def encode(self, text: str, place: Place) -> Encoded:
        """A content as plain text: no added token is found in it, and ``ends`` refer to ``text`` itself.

        A blank that the tokenizer puts in front is there if it would be in the whole rendering; it has no width.

        Raises:
            CannotTokenize: its tokens do not rejoin it.
        """
        if not isinstance(self._text, HfTokenizer) or self._contents is None:
            return self._text.encode(text, complete=False)
        encoded = self._text.placed(text, self._contents.ids(text, place))
        if wrong := [token for token in encoded.ids.tolist() if self.table.role[token] not in (None, "unk")]:
            raise CannotTokenize(
                f"tokenizer {self.table.info.name!r} makes its control token {self.added.get(wrong[0])!r} of plain "
                f"text, the content that starts {text[:40]!r}: who writes such text would steer the model; leave the "
                "conversation out, or use another tokenizer",
                rule="a content becomes a control token",
            )
        return encoded


class _Parts:
    """Ids of parts of a longer text. A tokenizer may put a blank in front of a text, or behind each added token."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._leads: dict[Place, list[int]] = {}
        if backend.encode("a", add_special_tokens=False).tokens[0][:1] in _BLANKS:
            self._mark()
            self._leads = {place: self._ids(lead) for place, lead in _LEADS.items()}

    def _mark(self) -> None:
        from tokenizers import AddedToken

        self._backend.add_tokens([AddedToken(_MARK, special=False, normalized=False)])

    def ids(self, text: str, place: Place) -> list[int]:
        if not text:
            return []
        if _MARK in text:
            raise CannotTokenize(
                f"a text holds {_MARK!r}, which the tokenizer uses itself; leave it out", rule="a text holds U+FDD0"
            )
        lead = self._leads.get(place)
        if not lead:
            return self._ids(text)
        ids = self._ids(_LEADS[place] + text)
        return ids[len(lead) :] if ids[: len(lead)] == lead else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def marking(path: Path, spec: Spec, controls: Sequence[str]) -> Any:
    """A ``tokenizers.Tokenizer`` that finds every added token of a file, and control tokens that it does not list.

    Raises:
        XtokenError: an added token has another id than the file gives it.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    backend.add_special_tokens([token for token in controls if token in spec.vocab and token not in spec.added])
    for token, one in spec.added_ids.items():
        if backend.token_to_id(one.content) != token:
            raise XtokenError(
                f"{path}: its added token {one.content!r} has id {token}, but is loaded as "
                f"{backend.token_to_id(one.content)}; fetch tokenizer.json again, or correct the id"
            )
    return backend
