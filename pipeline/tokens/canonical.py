"""Which token sequences a tokenizer writes itself: canonical ones, and those that can still become one.

A sequence is canonical if encoding its text gives it back. It is viable if some text that goes on gives it back as its
beginning: what is canonical need not be so in parts, since a pre-token may depend on what follows ("a\\n\\nb" is
a, \\n, \\n, b to GPT-2's pattern, and "a\\n\\n" is a, \\n\\n).

The tokenizer itself decides, on the last tokens of a sequence: merges and pre-tokens do not reach further. A sequence
whose last character is not whole yet is viable until the character is.
"""

from collections.abc import Mapping, Sequence

from xtoken.pipeline.tokens.interface import TextTokenizer
from xtoken.schemas.errors import XtokenError

_TAIL = 3  # tokens that are encoded again, at least
# What is tried behind a sequence beside nothing: one of each kind of character where a pattern may look ahead; letters
# where a whole word may be a token that is none within a longer word.
_AFTER_BLANK = ("a", " ", "\n", "0", ".", "\u4e2d")
_AFTER_WORD = ("z", "Q")


class Canonical:
    """Decides about the sequences of one tokenizer.

    Attributes:
        token_bytes: [V] what each token stands for; nothing for control tokens.
        lead: bytes that the tokens of a text begin with and the text does not: the blank that some put in front. Some
            put it in front of every text, others only where the text has none.
    """

    def __init__(self, tokenizer: TextTokenizer, tail: int | None = _TAIL) -> None:
        """Of a tokenizer.

        Args:
            tokenizer: it encodes.
            tail: how many tokens at the end of a sequence decide; None: all of them, which is slow.
        """
        self.token_bytes = tokenizer.table.pieces()
        self._ids, self._tail = tokenizer.token_ids, tail
        self._name = tokenizer.table.info.name
        self._after_word = _AFTER_WORD if tokenizer.whole_words else ()
        joined = self._joined(self._ids(["a"])[0])
        self.lead = joined.removesuffix(b"a")
        begun = self.lead + b"a"  # as a text of its own: has it the lead already?
        self._once = bool(self.lead) and self._joined(self._ids([begun.decode()])[0]) == begun

    def lead_of(self, data: bytes) -> bytes:
        """What the tokens of this text have in front of it."""
        return b"" if self._once and data.startswith(self.lead) else self.lead

    def encode(self, data: bytes) -> list[int]:
        """The canonical tokens of whole characters, ``lead_of`` them included."""
        return self._ids([(data if self._once else data.removeprefix(self.lead)).decode()])[0]

    def first_tokens(self, texts: Sequence[bytes]) -> list[int]:
        """The first canonical token of each text, as it is written within a longer one behind a boundary of tokens.

        Returns:
            ids [texts]; -1 for bytes that are no text, and where the tokenizer does not spell them byte by byte.
        """
        found, asked = [-1] * len(texts), {}
        for at, data in enumerate(texts):
            # A blank that the tokenizer puts in front of a text is the text's own here, or stands before a line end.
            before = b"" if data.startswith(self.lead) else b"\n"
            text = self._text(data if not before else self.lead + before + data)
            if text:
                asked[at] = (text, len(self.lead + before) if before else 0)
        for (at, (_, begin)), ids in zip(asked.items(), self._ids([text for text, _ in asked.values()]), strict=True):
            end = 0
            for token in ids:
                piece = self.token_bytes[token]
                if end == begin and piece:
                    found[at] = token if texts[at].startswith(piece) else -1
                    break
                end += len(piece)
        return found

    def refuse_unspelt(self, texts: Mapping[str, bytes]) -> None:
        """Refuse texts, by name, that the tokens do not spell byte by byte.

        Raises:
            XtokenError: the tokenizer normalises one of them, or lacks a token for a byte.
        """
        for name, data in texts.items():
            whole = self.lead_of(data) + data
            spelt = self._joined(self.encode(whole))
            if spelt != whole:
                raise XtokenError(
                    f"{name}: the tokens of {self._name} do not spell this text but {spelt[:60]!r}, so that they give "
                    "no probability of its bytes; leave the document out, or write it as the tokenizer does"
                )

    def complete(self, ids: Sequence[int]) -> bool:
        """Whether a sequence is canonical: a text may end there."""
        text = self._text(self._joined(ids))
        return text is not None and self._ids([text])[0] == list(ids)

    def viable(self, ids: Sequence[int], following: Sequence[int]) -> list[bool]:
        """For each token of ``following``, whether ``ids`` (viable itself) and that token are viable."""
        tail = self._tail_of(ids)
        before, found, asked = self._joined(tail), [True] * len(following), {}
        for at, token in enumerate(following):
            data = before + self.token_bytes[token]
            text = self._text(data)
            if text is not None:
                asked[at] = text
            elif not (data.startswith(self.lead) and _goes_on(data)):
                found[at] = False
        self._ask(tail, following, found, asked)
        return found

    def _ask(self, tail: list[int], following: Sequence[int], found: list[bool], asked: dict[int, str]) -> None:
        """Encode these texts, then those that fail once more with each continuation."""
        failed = self._failing(tail, following, asked, "")
        blank = {at: text for at, text in failed.items() if not text or text[-1].isspace()}
        word = {at: text for at, text in failed.items() if at not in blank}
        for kind, continuations in ((blank, _AFTER_BLANK), (word, self._after_word)):
            for more in continuations:
                kind = self._failing(tail, following, kind, more)
            for at in kind:
                found[at] = False

    def _failing(self, tail: list[int], following: Sequence[int], asked: dict[int, str], more: str) -> dict[int, str]:
        encoded = self._ids([text + more for text in asked.values()]) if asked else []
        return {
            at: text
            for (at, text), ids in zip(asked.items(), encoded, strict=True)
            if ids[: len(tail) + 1] != [*tail, following[at]]
        }

    def _tail_of(self, ids: Sequence[int]) -> list[int]:
        """The last tokens, from one on that begins a character and that a text may begin with; else all."""
        whole = list(ids)
        start = len(whole) if self._tail is None else self._tail
        for length in range(start, min(len(whole), start + 8)):
            tail = whole[-length:]
            text = self._text(self._joined(tail), cut=True)
            if text is not None and self._ids([text])[0][: length // 2] == tail[: length // 2]:
                return tail
        return whole

    def _joined(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def _text(self, data: bytes, *, cut: bool = False) -> str | None:
        """What the tokenizer is given for these bytes; None for no text; ``cut``: a last character may be in parts."""
        if not data.startswith(self.lead):
            return None
        if not self._once:
            data = data[len(self.lead) :]
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return data[: error.start].decode() if cut and _is_open(error, data) else None


def _goes_on(data: bytes) -> bool:
    """Whether bytes that are no text can become one."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return _is_open(error, data)
    return False


def _is_open(error: UnicodeDecodeError, data: bytes) -> bool:
    return error.end == len(data) and error.reason == "unexpected end of data"
