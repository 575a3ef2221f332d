"""The rules by which W may differ from its default, each an ablation or a baseline: first-piece, reverse, random, mined
and masked.

Shapes: N entries of W, V student vocabulary, U teacher vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.project.categories import categories, selected
from xtoken.pipeline.project.pieces import PIECES_KEPT, RAW_WEIGHTS, Segmenter
from xtoken.pipeline.project.projection import EXACT, MINED, RANDOM, REVERSE, ROLE
from xtoken.schemas.configs.artifacts import RULES
from xtoken.schemas.errors import XtokenError

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TokenTable

REVERSE_KEPT = 4
MINED_REACH = 3  # bytes that a token of rule mined may be longer or shorter than its row's
REVERSE_SHARE = 0.1  # what a row's reverse entries weigh together, beside 1 for its own


@dataclass(frozen=True)
class Entries:
    """Entries of W: ascending by student id, within a row the largest weight first.

    Attributes:
        student_id: int32 [N].
        teacher_id: int32 [N].
        weight: float64 [N].
        kind: int8 [N], index into ``KINDS``.
    """

    student_id: NDArray[np.int32]
    teacher_id: NDArray[np.int32]
    weight: NDArray[np.float64]
    kind: NDArray[np.int8]

    @classmethod
    def joined(cls, *groups: "Entries") -> "Entries":
        """All entries of some groups, equal pairs added up, in order."""
        names = cls.__dataclass_fields__
        return cls(*(np.concatenate([getattr(group, name) for group in groups]) for name in names))._merged()

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Entries":
        """The entries that a mask or an index array [N] selects."""
        return Entries(self.student_id[chosen], self.teacher_id[chosen], self.weight[chosen], self.kind[chosen])

    def weighing(self, weight: NDArray[np.float64]) -> "Entries":
        """The same entries with other weights [N]."""
        return Entries(self.student_id, self.teacher_id, weight, self.kind)

    def row_sums(self) -> NDArray[np.float64]:
        """float64 [N]: at each entry the total of its row."""
        total: NDArray[Any] = np.bincount(self.student_id, weights=self.weight)
        return total[self.student_id]

    def _merged(self) -> "Entries":
        key = self.student_id.astype(np.int64) << 32 | self.teacher_id
        _, first, pair = np.unique(key, return_index=True, return_inverse=True)
        weight: NDArray[Any] = np.bincount(pair, weights=self.weight, minlength=len(first))
        one = self.where(first).weighing(weight)
        return one.where(np.lexsort((first, -one.weight, one.student_id)))


def apply_rule(rule: str, seed: int, entries: Entries, student: "TokenTable", teacher: "TokenTable") -> Entries:
    """What a rule of ``xtoken.schemas.configs.artifacts.ProjectConfig`` makes of the default entries.

    Raises:
        XtokenError: the rule is unknown.
    """
    name, _, named = rule.partition(":")
    if name == "masked" and selected(named):
        return masked(entries, student, named)
    if rule == "pieces":
        return entries
    if rule == "first-piece":
        return first_piece(entries)
    if rule == "reverse":
        return reverse(entries, student, teacher)
    if rule == "random":
        return random(entries, teacher, seed)
    if rule == "mined":
        return mined(entries, student, teacher)
    raise XtokenError(f"rule {rule!r} is unknown; choose from {', '.join(RULES)}, masked:CATEGORY")


def first_piece(entries: Entries) -> Entries:
    """Each row's first piece with weight 1; exact and role rows are so already."""
    first = entries.where(np.diff(entries.student_id, prepend=-1) != 0)
    return first.weighing(np.ones(len(first.weight)))


def masked(entries: Entries, student: "TokenTable", name: str) -> Entries:
    """Without the rows of one category's student tokens."""
    return entries.where(~np.isin(categories(student)[entries.student_id], selected(name)))


def reverse(entries: Entries, student: "TokenTable", teacher: "TokenTable") -> Entries:
    """Also from teacher tokens to their student pieces, so that fewer columns stay empty.

    A teacher text token t that no row reaches is spelt by the student's own segmentation s_0 .. s_m, which proposes
    the entries (s_i, t) of raw weight r = 0.9 * 0.1^i for the first four; a piece that occurs twice adds up. Of the
    proposals to one student row, the four of largest r stay (ties: lower teacher id), and row s becomes

        (own entries, which sum to 1 + REVERSE_SHARE * r / sum of the kept r) / (1 + REVERSE_SHARE)

    so its own entries keep 1 / 1.1 of the weight. A row that had none consists of its proposals alone.
    """
    proposed = _proposals(entries, student, teacher)
    order = np.lexsort((proposed.teacher_id, -proposed.weight, proposed.student_id))
    ranked = proposed.where(order)
    start = np.flatnonzero(np.diff(ranked.student_id, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(start, np.diff(start, append=len(order)))
    kept = ranked.where(rank < REVERSE_KEPT)
    both = Entries.joined(entries, kept.weighing(REVERSE_SHARE * kept.weight / kept.row_sums()))
    return both.weighing(both.weight / both.row_sums())


def _proposals(entries: Entries, student: "TokenTable", teacher: "TokenTable") -> Entries:
    segmenter, spell = Segmenter(student), teacher.pieces()
    reached = np.zeros(teacher.size, np.bool_)
    reached[entries.teacher_id] = True
    owner: list[int] = []
    target: list[int] = []
    raw: list[float] = []
    for t in np.flatnonzero(text_tokens(teacher) & ~reached).tolist():
        pieces = (segmenter.split(spell[t]) or [])[:PIECES_KEPT]
        owner += pieces
        target += [t] * len(pieces)
        raw += RAW_WEIGHTS[: len(pieces)]
    kind = np.full(len(owner), REVERSE, np.int8)
    return Entries.joined(Entries(np.array(owner, np.int32), np.array(target, np.int32), np.array(raw), kind))


def random(entries: Entries, teacher: "TokenTable", seed: int) -> Entries:
    """The control: text rows keep their weights and point at teacher text tokens drawn at random.

    Targets are uniform and differ within a row (a row with a repetition is drawn again). Special tokens keep the
    teacher's token of their role.
    """
    text, generator = np.flatnonzero(text_tokens(teacher)).astype(np.int32), np.random.default_rng(seed)
    teacher_id, is_text = entries.teacher_id.copy(), entries.kind != ROLE
    todo = is_text
    while todo.any():
        teacher_id[todo] = generator.choice(text, int(todo.sum()))
        todo = is_text & np.isin(entries.student_id, _rows_with_repeats(entries.student_id, teacher_id))
    return Entries(entries.student_id, teacher_id, entries.weight, np.where(is_text, RANDOM, entries.kind))


def mined(entries: Entries, student: "TokenTable", teacher: "TokenTable") -> Entries:
    """Least edit distance: exact and role rows stay; every other text row has one entry of weight 1, or none.

    That is the teacher text token of least Levenshtein distance over bytes, among those that share the first byte and
    differ by at most ``MINED_REACH`` in length; of equally near ones the lower id. Of teacher tokens of equal bytes
    the one that exact rows take counts (``TokenTable.by_bytes``). The vocabulary mapping of MinED (FuseLLM,
    arXiv 2401.10491), the baseline of ALM (arXiv 2503.20083), which looks at all tokens; over bytes, not characters.
    """
    # numba takes a second to import: only for this rule
    from xtoken.pipeline.project.kernels import nearest

    kept = entries.where((entries.kind == EXACT) | (entries.kind == ROLE))
    asked = text_tokens(student)
    asked[kept.student_id] = False
    asked_V = np.flatnonzero(asked)
    known_M = np.array(sorted(teacher.by_bytes().values()), np.int64)
    found = nearest(*_spelt(student, asked_V), *_spelt(teacher, known_M), MINED_REACH)
    owner, target = asked_V[found >= 0], known_M[found[found >= 0]]
    kind = np.full(len(owner), MINED, np.int8)
    return Entries.joined(kept, Entries(owner.astype(np.int32), target.astype(np.int32), np.ones(len(owner)), kind))


def _spelt(table: "TokenTable", ids: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of some tokens one after the other, and where each starts, with the end of the last behind."""
    pieces = [table.token(token) for token in ids.tolist()]
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)])
    return np.frombuffer(b"".join(pieces), np.uint8), start


def _rows_with_repeats(student_id: NDArray[np.int32], teacher_id: NDArray[np.int32]) -> NDArray[np.int32]:
    order = np.lexsort((teacher_id, student_id))
    s, t = student_id[order], teacher_id[order]
    repeated: NDArray[np.int32] = s[1:][(s[1:] == s[:-1]) & (t[1:] == t[:-1])]
    return repeated


def text_tokens(table: "TokenTable") -> NDArray[np.bool_]:
    """bool [V]: ids that stand for bytes of a text."""
    return np.array([role is None for role in table.role], np.bool_) & (table.lengths > 0)
