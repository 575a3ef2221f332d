"""Text that a chat template seems to have written: its marks reach a teacher as pieces of text, not as its tokens."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from xtoken.pipeline.corpus import Document
from xtoken.pipeline.tokens import TextTokenizer
from xtoken.schemas.configs.capture import CorpusGroup, TeacherGroup
from xtoken.schemas.errors import XtokenError

# How nearly all control tokens are written: in brackets, by first characters.
_USUAL = {"<": r"[^<>\s]{1,64}>", "[": r"[^\[\]\s]{1,64}\]"}
# Tokens that no chat template writes, and texts hold for other reasons.
_WORDS = {"<unk>", "<pad>", "<mask>", "[UNK]", "[PAD]", "[MASK]", "[CLS]", "[SEP]"}
_HTML = {"<s>", "</s>"}  # struck-out text, unless the document begins with BOS or ends with an EOS that closes nothing
_SEVERAL = 2  # in a document: one is a mention, unless it stands at the very beginning or end
_SHARE = 0.01  # of the documents: fewer are about chat templates
_ENOUGH = 1000  # such documents, if they are half of all so far: no need to read on
_NAMED = 4
REASON = "control tokens as text"
_LOG = logging.getLogger("xtoken")


class Look:
    """Counts documents that hold control tokens of a teacher as text, several or one at an end.

    Attributes:
        documents: that were looked at.
        rendered: those of them that look as if a chat template wrote them.
    """

    @classmethod
    def of(cls, corpus: CorpusGroup, teacher: TeacherGroup, tokenizer: TextTokenizer) -> "Look":
        """For a run's teacher. The fake one, for trials, warns where others refuse."""
        stop, fake = corpus.on_rendered == "stop", teacher.backend == "fake"
        return cls(teacher.teacher, tokenizer.controls.values(), refuse=stop and not fake, warn=stop and fake)

    def __init__(self, teacher: str, controls: Collection[str], *, refuse: bool, warn: bool = False) -> None:
        """Begin.

        Args:
            teacher: its name.
            controls: how its control tokens are spelt (``TextTokenizer.controls``).
            refuse: whether ``check`` refuses.
            warn: whether it says so and goes on.
        """
        self._teacher, self._refuse, self._warn = teacher, refuse, warn
        self._controls = frozenset(controls) - _WORDS
        self._pattern = _pattern(self._controls)
        self._found: Counter[str] = Counter()
        self._first = ""
        self.documents = self.rendered = 0

    def over(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents, each looked at on its way.

        Raises:
            XtokenError: as ``check``, at the end or as soon as there is no doubt.
        """
        for document in documents:
            self._add(document)
            if self._refuse and self.rendered >= _ENOUGH and 2 * self.rendered >= self.documents:
                self.check()
            yield document
        self.check()

    def _add(self, document: Document) -> None:
        self.documents += 1
        marks = _marks(
            document.text, [match for match in self._pattern.finditer(document.text) if match[0] in self._controls]
        )
        if not marks:
            return
        self._first = self._first or document.id
        self.rendered += 1
        self._found.update(list(dict.fromkeys(marks)))

    @property
    def counts(self) -> dict[str, int]:
        """Such documents by reason, as a plan records what is the matter with documents."""
        return {REASON: self.rendered} if self.rendered else {}

    def check(self) -> None:
        """Refuse what looks rendered.

        Raises:
            XtokenError: so many documents do that they are no mention; the message names the share and the tokens.
        """
        if not (self._refuse or self._warn) or not self.rendered or self.rendered < _SHARE * self.documents:
            return
        tokens = ", ".join(token for token, _ in self._found.most_common(_NAMED))
        message = (
            f"{self.rendered:,} of {self.documents:,} documents ({self.rendered / self.documents:.0%}) hold control "
            f"tokens of {self._teacher} as text ({tokens}; the first is {self._first!r}), as chat templates and packed "
            "files do: the teacher would read such marks as pieces of text. Give the conversations themselves, as "
            "messages (precompute renders them with the teacher's chat template; --form messages if a file has both), "
            "write one document per record, or say --on-rendered text if they are meant as text"
        )
        if self._refuse:
            raise XtokenError(message)
        _LOG.warning("%s. The fake teacher goes on; hf and vllm refuse such a corpus", message)


def _marks(text: str, matches: list[re.Match[str]]) -> list[str]:
    """What a template seems to have written of the control tokens in a text; nothing where they are a mention."""
    if not matches:
        return []
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    tokens = [match[0] for match in matches]
    # struck-out text is opened before it is closed
    if not text.startswith("<s>", begin) and not (text.endswith("</s>", 0, end) and "<s>" not in tokens):
        matches = [match for match in matches if match[0] not in _HTML]
    at_an_end = bool(matches) and (matches[0].start() == begin or matches[-1].end() == end)
    return [match[0] for match in matches] if at_an_end or len(matches) >= _SEVERAL else []


def _pattern(controls: Collection[str]) -> re.Pattern[str]:
    """What finds all control tokens in a text, and a little more; nothing where there are none."""
    shapes, others = [], set(controls)
    for bracket, rest in _USUAL.items():
        usual = {token for token in controls if re.fullmatch(re.escape(bracket) + rest, token)}
        others -= usual
        if usual:
            seconds = "".join(sorted({re.escape(token[1]) for token in usual}))
            shapes.append(f"{re.escape(bracket)}(?=[{seconds}]){rest}")
    # of those that begin alike, the longest
    shapes = [*map(re.escape, sorted(others, key=len, reverse=True)), *shapes]
    return re.compile("|".join(shapes) or "(?!)")
