"""What each loss needs stored: its columns of a target table, what they hold, and what people read of it.

To add a loss is an entry here, a file in ``pipeline/align/losses`` and one in ``trainer/losses``, and its options.
Names, axes and descriptions of columns are public format (see ``schemas.tables``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import pyarrow as pa

Holds = Literal["count", "student ids", "teacher ids", "shared ids", "ranks", "logprob", "tail", "value"]
INTS, FLOATS, STEPS, BOOLS = (
    pa.list_(pa.field("element", kind, nullable=False)) for kind in (pa.int32(), pa.float32(), pa.uint16(), pa.bool_())
)
# Of columns that are stored otherwise than they are read, in the footer of every part since version 6: frozen.
_CODES_DOC = "[K] tokens by their code, "
_GAP_DOC = "[K] steps of the manifest: rank 0 -logprob, later ranks distance to the rank before; "
_WITH_TAIL, _ALONE = "made to sum to 1 with REST, where that is known", "the loss makes them sum to 1"
_TAIL_GAP_DOC = "steps of the manifest: -log of REST; 65535 = none; 65534 = unknown"


def target_field(name: str, kind: pa.DataType, axis: str, doc: str) -> pa.Field:
    """A target column. ``axis`` says what it has one value (or, for lists, one element) of: see ``TargetColumn``.

    Both texts are written into the footer of every part: to change one is to change what lies on disk.
    """
    return pa.field(name, kind, nullable=False, metadata={"doc": doc, "axis": axis})


@dataclass(frozen=True)
class LossColumn:
    """A column that one loss (or several) adds to a target table.

    Attributes:
        name: its name on disk.
        type: ``INTS`` or ``FLOATS``, a list per sample.
        axis: see ``TargetColumn``; a count column stands before the columns whose axis it is.
        doc: a line, written into the footer of every part.
        holds: what its elements are. ``count``: entries of each chunk or token. ``student ids``; ``teacher ids``,
            reached through W; ``shared ids``, of the one vocabulary of both sides. ``ranks``: places among the
            student's text tokens in order of (bytes, id), two columns of them being a range. ``logprob``: nats of an
            entry, which adds to its target's mass. ``tail``: log of the tail mass of a target. ``value``: any other
            log-probability.
        label: of a value, what a page calls it.
    """

    name: str
    type: pa.DataType
    axis: str
    doc: str
    holds: Holds
    label: str = ""

    @property
    def field(self) -> pa.Field:
        """As it lies on disk."""
        return target_field(self.name, self.type, self.axis, self.doc)


@dataclass(frozen=True)
class GapColumns:
    """Columns of entries that are stored in steps: counts, log-probabilities, and the tail mass where there is one."""

    count: str
    logprob: str
    tail: str | None


@dataclass(frozen=True)
class EntryTable:
    """Count columns whose entries belong together: one view of 'xtoken query', and one mass that is at most 1.

    Attributes:
        name: stem of the view: ``NAME_entries``.
        counts: count columns of one axis.
        split: where there are two, the view's boolean column that is true of the first, and what it means.
    """

    name: str
    counts: tuple[str, ...]
    split: tuple[str, str] | None = None


class About(NamedTuple):
    """What ``xtoken losses`` prints of a loss."""

    matches: str
    needs_stored: str
    use_when: str
    source: str = ""


@dataclass(frozen=True)
class LossSchema:
    """Everything that the layers have to know of a loss without importing it.

    Attributes:
        module: its file in ``pipeline/align/losses`` and in ``trainer/losses``, without .py.
        columns: those that it adds to a target table, in order.
        tables: how their entries belong together; left out: each count column alone, named without ``_count``.
        merges: values of 'xtoken align --merge' that it is defined with.
        renormalised: its entries are renormalised where they are read, so that nothing outside them counts.
        first_only: it reads the student at the first token of a chunk; those behind it learn from CE alone.
        about: what people read of it.
    """

    module: str
    columns: tuple[LossColumn, ...] = ()
    tables: tuple[EntryTable, ...] = ()
    merges: tuple[str, ...] = ("first",)
    renormalised: bool = False
    first_only: bool = False
    about: About = field(kw_only=True)

    @property
    def entry_tables(self) -> tuple[EntryTable, ...]:
        """``tables``, or what they are when left out."""
        counts = (column.name for column in self.columns if column.holds == "count")
        return self.tables or tuple(EntryTable(name.removesuffix("_count"), (name,)) for name in counts)

    def column(self, name: str) -> LossColumn:
        """One of the columns."""
        return next(column for column in self.columns if column.name == name)

    def along(self, axis: str, *holds: Holds) -> list[LossColumn]:
        """Columns of an axis that hold one of these."""
        return [column for column in self.columns if column.axis == axis and column.holds in holds]

    def tail_of(self, table: EntryTable) -> LossColumn | None:
        """The column with the tail mass of a table's targets, named after the table."""
        name = f"{table.name}_rest_logprob"
        return next((column for column in self.columns if column.name == name and column.holds == "tail"), None)

    @property
    def gaps(self) -> list[GapColumns]:
        """What is stored in steps (``xtoken.schemas.gaps``): entries that are made to sum to 1, with their tail mass by
        the reader or alone by the loss, so that what rounding gives to all of them goes out again."""
        found = []
        for table in self.entry_tables:
            tail, logprobs = self.tail_of(table), self.along(table.counts[0], "logprob")
            if len(table.counts) == len(logprobs) == 1 and (tail or self.renormalised):
                found.append(GapColumns(table.counts[0], logprobs[0].name, None if tail is None else tail.name))
        return found


# A chunk whose first teacher token has no row has count 0 and takes no part in the loss. Log-probabilities are nats at
# the manifest's temperature, except those of the text itself (teacher_logprob, alm_space_logprob), which are at 1.
_FACTOR = LossColumn(
    "factor_logprob",
    FLOATS,
    "chunk",
    "[C] nats: what the chunk's row is multiplied by, the realised tokens after it (merge first) or before (last)",
    "value",
    "factor: the chunk's other tokens",
)
_COMMON = ("common", "one of the pairs that are compared token by token; the others are compared as sorted lists")
_MATCHED = ("matched", "it has a student token of equal bytes; the others are compared as sorted lists")
_TAIL_DOC = "[C] nats: log of REST; -inf = none; NaN = unknown at this temperature, entries are then renormalised"
# Each loss of this project by name; to add one is an entry here, a file on each side, and its options.
LOSSES: dict[str, LossSchema] = {
    "ce": LossSchema(
        "ce",
        merges=("first", "last", "mean"),
        about=About("the text alone", "nothing", "the baseline to beat"),
    ),
    "p-kl": LossSchema(
        "pkl",
        (
            LossColumn("pkl_count", INTS, "chunk", "[C] entries of the chunk", "count"),
            LossColumn(
                "pkl_ids",
                INTS,
                "pkl_count",
                "[K] teacher ids, most probable first, all reached by W",
                "teacher ids",
            ),
            LossColumn(
                "pkl_logprob",
                FLOATS,
                "pkl_count",
                "[K] nats, after unreached mass moved; exp sums to 1 with REST",
                "logprob",
            ),
            LossColumn("pkl_rest_logprob", FLOATS, "chunk", _TAIL_DOC, "tail"),
        ),
        merges=("first", "mean"),
        first_only=True,
        about=About(
            "the student through W against the teacher's distribution, the tail as one cell",
            "entries of reached ids, tail mass",
            "numerals do not map one to one",
            "arXiv 2605.21699",
        ),
    ),
    "h-kl": LossSchema(
        "hkl",
        (
            LossColumn("hkl_common_count", INTS, "chunk", "[C] entries in the common set", "count"),
            LossColumn(
                "hkl_common_ids",
                INTS,
                "hkl_common_count",
                "[K] student ids of pairs in C, most probable first",
                "student ids",
            ),
            LossColumn(
                "hkl_common_logprob",
                FLOATS,
                "hkl_common_count",
                "[K] nats: teacher log-probability of the pair",
                "logprob",
            ),
            LossColumn("hkl_other_count", INTS, "chunk", "[C] kept entries outside C", "count"),
            LossColumn(
                "hkl_other_logprob",
                FLOATS,
                "hkl_other_count",
                "[K] nats: teacher log-probabilities outside C, descending",
                "logprob",
            ),
        ),
        (EntryTable("hkl", ("hkl_common_count", "hkl_other_count"), split=_COMMON),),
        merges=("first", "mean"),
        first_only=True,
        about=About(
            "one-to-one pairs token by token, the others as sorted lists",
            "entries of pairs, others sorted",
            "numerals map one to one",
            "arXiv 2605.21699",
        ),
    ),
    "gold": LossSchema(
        "gold",
        (
            LossColumn("gold_count", INTS, "chunk", "[C] kept entries with a student token of equal bytes", "count"),
            LossColumn("gold_ids", INTS, "gold_count", "[K] these student ids, most probable first", "student ids"),
            LossColumn("gold_logprob", FLOATS, "gold_count", "[K] nats, descending", "logprob"),
            LossColumn("gold_other_count", INTS, "chunk", "[C] kept entries without one", "count"),
            LossColumn("gold_other_logprob", FLOATS, "gold_other_count", "[K] nats, descending", "logprob"),
            _FACTOR,
        ),
        (EntryTable("gold", ("gold_count", "gold_other_count"), split=_MATCHED),),
        merges=("first", "last"),
        about=About(
            "tokens of equal bytes by generalised JSD, the others as sorted lists",
            "as h-kl, chunk likelihood",
            "a baseline: strict pairs",
            "GOLD in TRL",
        ),
    ),
    "uld": LossSchema(
        "uld",
        (
            LossColumn("uld_count", INTS, "chunk", "[C] kept entries", "count"),
            LossColumn("uld_logprob", FLOATS, "uld_count", "[K] nats, descending", "logprob"),
            _FACTOR,
        ),
        merges=("first", "last"),
        about=About(
            "sorted probabilities, whatever the tokens",
            "sorted entries, likelihood",
            "a baseline: knows no tokens",
            "arXiv 2402.12030",
        ),
    ),
    "alm": LossSchema(
        "alm",
        (
            LossColumn(
                "alm_space_logprob",
                FLOATS,
                "chunk",
                "[C] nats: log P(the token after the chunk starts with a space); NaN = no row, or not captured",
                "value",
                "the next token starts with a space",
            ),
        ),
        merges=("first", "last", "mean"),
        about=About(
            "the likelihood of each chunk of text",
            "one number per chunk",
            "any pair, byte students too",
            "arXiv 2503.20083",
        ),
    ),
    "strict": LossSchema(
        "strict",
        (
            LossColumn(
                "strict_count",
                INTS,
                "chunk",
                "[C] entries of a chunk of one token on either side, at least 2; else 0",
                "count",
            ),
            LossColumn(
                "strict_ids",
                INTS,
                "strict_count",
                "[K] student ids of equal bytes, or that end a text or turn by role; most probable first",
                "student ids",
            ),
            LossColumn("strict_logprob", FLOATS, "strict_count", "[K] nats, descending; not renormalised", "logprob"),
        ),
        renormalised=True,
        first_only=True,
        about=About(
            "tokens of equal bytes, renormalised, where one token is one token",
            "entries of equal bytes",
            "tokenizers of much overlap",
            "arXiv 2610.08448",
        ),
    ),
    "mined": LossSchema(
        "mined",
        (
            LossColumn(
                "mined_count",
                INTS,
                "chunk",
                "[C] entries of a chunk of one token on either side; 0 = learnt from its labels",
                "count",
            ),
            LossColumn(
                "mined_ids",
                INTS,
                "mined_count",
                "[K] teacher ids, most probable first, all reached by W",
                "teacher ids",
            ),
            LossColumn(
                "mined_logprob",
                FLOATS,
                "mined_count",
                "[K] nats, after unreached mass moved; exp sums to 1 with REST",
                "logprob",
            ),
            LossColumn("mined_rest_logprob", FLOATS, "chunk", "[C] nats: log of REST; -inf = none", "tail"),
        ),
        about=About(
            "the student through W of least edit distance, where one token is one token; labels elsewhere",
            "entries of reached ids, tail mass",
            "a baseline: MinED",
            "arXiv 2503.20083",
        ),
    ),
    "byte-prefix": LossSchema(
        "byte_prefix",
        (
            LossColumn("prefix_count", INTS, "token", "[S] entries of the target that predicts this token", "count"),
            LossColumn("prefix_ids", INTS, "prefix_count", "[K] student ids, most probable first", "student ids"),
            LossColumn("prefix_logprob", FLOATS, "prefix_count", "[K] nats; exp sums to 1 with REST", "logprob"),
            LossColumn("prefix_rest_logprob", FLOATS, "token", "[S] nats: log of REST; -inf = none", "tail"),
            LossColumn(
                "child_count",
                INTS,
                "token",
                "[S] teacher groups of the chunk before whose next bytes the student spells from here on",
                "count",
            ),
            LossColumn(
                "child_low",
                INTS,
                "child_count",
                "[K] first of the student tokens that start with the group's next bytes, as a rank among the student's "
                "text tokens in order of (bytes, id)",
                "ranks",
            ),
            LossColumn("child_high", INTS, "child_count", "[K] rank after the last of them, above child_low", "ranks"),
            LossColumn("child_logprob", FLOATS, "child_count", "[K] nats: log of the group's mass", "logprob"),
        ),
        about=About(
            "the student's own tokens against the teacher's distribution cut at byte prefixes, inside chunks too",
            "entries per student token",
            "students that split words",
            "docs/losses.md",
        ),
    ),
    "sparse-kl": LossSchema(
        "sparse_kl",
        (
            LossColumn("skl_count", INTS, "chunk", "[C] kept entries; both tokenizers are the same", "count"),
            LossColumn("skl_ids", INTS, "skl_count", "[K] ids, most probable first", "shared ids"),
            LossColumn("skl_logprob", FLOATS, "skl_count", "[K] nats; exp sums to 1 with REST", "logprob"),
            LossColumn("skl_rest_logprob", FLOATS, "chunk", _TAIL_DOC, "tail"),
        ),
        about=About(
            "the distribution itself, token by token, the tail as one cell",
            "entries, tail mass",
            "one shared tokenizer",
            "docs/losses.md",
        ),
    ),
}


def loss_columns(losses: Iterable[str]) -> list[LossColumn]:
    """The columns that these losses add to a target table, in order, each once."""
    wanted = set(losses)
    columns = (column for name, loss in LOSSES.items() if name in wanted for column in loss.columns)
    return list({column.name: column for column in columns}.values())


def gap_columns(losses: Iterable[str]) -> list[GapColumns]:
    """What the target tables of these losses hold in steps since version 6."""
    wanted = set(losses)
    return [gaps for name, loss in LOSSES.items() if name in wanted for gaps in loss.gaps]


def holds_ids(column: LossColumn) -> bool:
    """Whether its elements are tokens, which are stored by code since version 6."""
    return column.holds in ("student ids", "teacher ids", "shared ids") and column.name.endswith("_ids")


def lean_fields(losses: Iterable[str]) -> dict[str, pa.Field]:
    """The fields on disk, since version 6, of columns that are stored otherwise than readers see them, by the name that
    these know."""
    found = {}
    axis = {column.name: column.axis for column in loss_columns(losses)}
    for column in filter(holds_ids, loss_columns(losses)):
        side = "student" if column.holds == "student ids" else "teacher"
        doc = f"{_CODES_DOC}{side}_id of codes.parquet; {column.doc.partition('] ')[2]}"
        found[column.name] = target_field(column.name.removesuffix("ids") + "codes", INTS, column.axis, doc)
    for gaps in gap_columns(losses):
        doc = _GAP_DOC + (_WITH_TAIL if gaps.tail else _ALONE)
        found[gaps.logprob] = _steps(gaps.logprob, gaps.count, doc)
        if gaps.tail:
            found[gaps.tail] = _steps(gaps.tail, axis[gaps.tail], f"[{axis[gaps.tail][0].upper()}] {_TAIL_GAP_DOC}")
    return found


def _steps(name: str, axis: str, doc: str) -> pa.Field:
    return target_field(name.removesuffix("logprob") + "gap", STEPS, axis, doc)
