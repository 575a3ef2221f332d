"""What must hold in every part of targets before it is published, in SQL. A breach is a defect.

``sql/check.sql`` judges what all tables have, ``sql/check_chat.sql`` what those of conversations have beside it; the
rules of a loss follow from what its columns hold.

What has an element per entry is too much to hold until a part is whole, so numpy and a kernel boil it down to extremes
of each sample first; SQL judges them, and the bytes that chunks cover.

Shapes: N samples, C chunks and K entries of all samples of a batch together.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.pipeline.align.chat_checks import chat_summary
from xtoken.pipeline.align.chunks import Joined, gaps, offsets_of
from xtoken.pipeline.align.kernels_targets import masses
from xtoken.pipeline.align.losses import builder
from xtoken.pipeline.align.maps import Maps
from xtoken.pipeline.align.queries import query
from xtoken.pipeline.align.rows import Recipe
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.losses import LOSSES, EntryTable, LossSchema, loss_columns

_AS_THEY_ARE = ("sample_id", "student_ids", "student_end", "chunk_student_end", "chunk_teacher_end")
_CONFIDENCE = ("teacher_entropy", "teacher_top1")
# What is wrong with a sample whose extremes are outside these, by what a column holds. Sums may be off by rounding to
# float32, and the codec's steps may put a label a little above certainty.
_RULES = {
    "count": (("{0} is negative", "{0}_low < 0"),),
    "student ids": (("{0} has an id outside the student's vocabulary", "{0}_low < 0 OR {0}_high >= $student"),),
    "teacher ids": (("{0} has an id outside the teacher's vocabulary", "{0}_low < 0 OR {0}_high >= $teacher"),),
    "shared ids": (("{0} has an id outside the vocabulary", "{0}_low < 0 OR {0}_high >= $student"),),
    "value": (("{0} is not a log-probability", "{0}_high > 2e-3"),),
    "tail": (
        ("{0} is not a log-probability", "{0}_high > 1e-5"),
        ("{0} is NaN where the tail mass is known", "NOT $rest_unknown AND {0}_unknown > 0"),
    ),
}


def summary_batch(
    batch: pa.RecordBatch, samples: Sequence[Joined], targets: pa.RecordBatch, losses: Sequence[str]
) -> pa.Table:
    """What ``Rules`` judges, a row per sample: its tokens and chunks, and the extremes of everything else.

    Args:
        batch: of ``CaptureParts.read``.
        samples: those of the batch that are aligned.
        targets: their targets.
        losses: that the targets serve.
    """
    columns: dict[str, Any] = {name: targets[name] for name in (*_AS_THEY_ARE, *_CONFIDENCE)}
    columns["teacher_end"] = batch["teacher_end"].take(pa.array([sample.at for sample in samples], pa.int64()))
    gap_C = gaps(samples)
    columns["student_end_step"] = _least_step(targets, "student_end", 0)
    for name in ("chunk_student_end", "chunk_teacher_end"):
        columns[f"{name}_step"] = _least_step(targets, name, gap_C)
        columns[f"{name}_gap"], columns[f"{name}_cut"] = (_where(targets, name, which) for which in (gap_C, ~gap_C))
    if targets.schema.get_field_index("learn") >= 0:
        columns |= chat_summary(batch, samples, targets, losses)
    columns |= _extremes(targets, "student_ids") | {"teacher_logprob_high": _greatest(targets, "teacher_logprob")}
    for column in loss_columns(losses):
        if column.holds == "value":
            columns[f"{column.name}_high"] = _greatest(targets, column.name)
        elif column.holds not in ("logprob", "tail"):
            columns |= _extremes(targets, column.name)
    for schema in (LOSSES[loss] for loss in losses):
        for table in schema.entry_tables:
            columns |= _masses(targets, schema, table) | _ranges(targets, schema, table)
    return pa.table(columns)


def _reduced(by: np.ufunc, values: NDArray[Any], lengths_N: NDArray[np.int64]) -> pa.Array:
    """One value for each sample's consecutive ``lengths_N`` ones, [N]; null where it has none."""
    filled_N = lengths_N > 0
    found_N = np.zeros(len(lengths_N), values.dtype)
    if filled_N.any():
        found_N[filled_N] = by.reduceat(values, (np.cumsum(lengths_N) - lengths_N)[filled_N])
    return pa.array(found_N, mask=~filled_N)


def _extremes(targets: pa.RecordBatch, name: str) -> dict[str, pa.Array]:
    """The smallest and the largest of each sample's values."""
    lengths_N, values = list_lengths(targets, name), flat(targets, name)
    by = {"low": np.minimum, "high": np.maximum}
    return {f"{name}_{which}": _reduced(reduce, values, lengths_N) for which, reduce in by.items()}


def _greatest(targets: pa.RecordBatch, name: str) -> pa.Array:
    """The largest number of each sample's values, [N]; null where it has none but NaN."""
    largest = _reduced(np.fmax, flat(targets, name), list_lengths(targets, name))
    return pc.if_else(pc.is_nan(largest), pa.scalar(None, largest.type), largest)


def _least_step(targets: pa.RecordBatch, name: str, spared: NDArray[np.bool_] | int) -> pa.Array:
    """The least that a list of ends goes up by, from 0 on, [N]; ``spared`` is added to the steps."""
    lengths_N, values = list_lengths(targets, name), flat(targets, name)
    step = np.diff(values, prepend=values[:0].dtype.type(0))
    first_N, filled_N = np.cumsum(lengths_N) - lengths_N, lengths_N > 0
    step[first_N[filled_N]] = values[first_N[filled_N]]
    return _reduced(np.minimum, step + spared, lengths_N)


def _where(targets: pa.RecordBatch, name: str, chosen: NDArray[np.bool_]) -> pa.ListArray:
    """The chosen elements of a list column."""
    kept = offsets_of(chosen.astype(np.int64))[offsets_of(list_lengths(targets, name))]
    return pa.ListArray.from_arrays(pa.array(kept.astype(np.int32)), pa.array(flat(targets, name)[chosen]))


def _masses(targets: pa.RecordBatch, schema: LossSchema, table: EntryTable) -> dict[str, pa.Array]:
    """Extremes of what the entries of a table add up to, with the tail mass where that is known, and of the latter."""
    lengths_N = list_lengths(targets, table.counts[0])
    logprobs = [(count, column.name) for count in table.counts for column in schema.along(count, "logprob")]
    if not logprobs:
        return {}
    total_C = np.sum([masses(flat(targets, count), np.exp(flat(targets, name))) for count, name in logprobs], axis=0)
    columns, tail = {}, schema.tail_of(table)
    if tail is not None:
        tail_C = flat(targets, tail.name)
        unknown_C = np.isnan(tail_C)
        total_C = total_C + np.where(unknown_C, 0.0, np.exp(tail_C.astype(np.float64)))
        columns[f"{tail.name}_high"] = _greatest(targets, tail.name)
        columns[f"{tail.name}_unknown"] = _reduced(np.add, unknown_C.astype(np.int32), lengths_N)
    columns[f"{table.name}_mass_low"] = _reduced(np.minimum, total_C, lengths_N)
    columns[f"{table.name}_mass_high"] = _reduced(np.maximum, total_C, lengths_N)
    return columns


def _ranges(targets: pa.RecordBatch, schema: LossSchema, table: EntryTable) -> dict[str, pa.Array]:
    """The narrowest of each sample's ranges of ranks: ``HIGH_above_LOW`` by the names of the two columns."""
    columns = {}
    for count in table.counts:
        for low, high in zip(*[iter(column.name for column in schema.along(count, "ranks"))] * 2, strict=True):
            width_K = flat(targets, high) - flat(targets, low)
            columns[f"{high}_above_{low}"] = _reduced(np.minimum, width_K, list_lengths(targets, low))
    return columns


def rules_of(loss: str) -> dict[str, str]:
    """What must hold of a loss's columns: a sentence, and the SQL condition under which a sample breaks it.

    Follows from what the columns hold (``xtoken.schemas.losses.LOSSES``); the loss's builder may have more.
    """
    schema = LOSSES[loss]
    rules = {
        sentence.format(column.name): condition.format(column.name)
        for column in schema.columns
        for sentence, condition in _RULES.get(column.holds, ())
    }
    for table in schema.entry_tables:
        names = " and ".join(column.name for count in table.counts for column in schema.along(count, "logprob"))
        above = f"{table.name}_mass_high > 1 + 1e-5"
        if names and schema.tail_of(table) is not None:
            # of samples, what no cell holds is left out
            whole = f"{above} OR (NOT $drawn AND {table.name}_mass_low < 1 - 1e-5)"
            rules[f"{names} and the tail mass do not sum to 1"] = whole
        elif names:
            rules[f"{names} sum{'' if ' and ' in names else 's'} to more than 1"] = above
    return {**rules, **builder(loss).rules}


def rules_sql(loss: str) -> str:
    """A query over ``built`` with a row per sample and rule of a loss that it breaks; empty where it has no rule."""
    quoted = {sentence.replace("'", "''"): condition for sentence, condition in rules_of(loss).items()}
    cases = ",\n".join(f"    CASE WHEN {condition} THEN '{sentence}' END" for sentence, condition in quoted.items())
    return f"SELECT sample_id, unnest([\n{cases}\n]) AS rule FROM built" if cases else ""


@dataclass(frozen=True)
class Rules:
    """The rules of targets that were built of ``maps`` by ``recipe``; DuckDB may use ``memory_limit``."""

    maps: Maps
    recipe: Recipe
    memory_limit: str = "1GB"

    @cached_property
    def _connection(self) -> Any:
        import duckdb

        return duckdb.connect(config={"memory_limit": self.memory_limit, "threads": 1, "temp_directory": ""})

    def broken(self, built: pa.Table) -> Iterator[tuple[str, str]]:
        """Samples and the rules that they break.

        Args:
            built: tables of ``summary_batch``, one after the other.
        """
        known = {
            "student": self.maps.student_size,
            "teacher": self.maps.teacher_size,
            "text": self.maps.student_text,
            "drawn": self.recipe.drawn,
            "rest_unknown": not self.recipe.rest_known,
            "chat": "learn" in built.schema.names,
        }
        texts = [query("check"), *filter(None, map(rules_sql, self.recipe.losses))]
        if "learn" in built.schema.names:
            texts.append(query("check_chat"))
        joined = " UNION ALL ".join(f"({text})" for text in texts)
        used = {name: value for name, value in known.items() if re.search(rf"\${name}\b", joined)}
        self._connection.register("built", built)
        try:
            sql = f"SELECT sample_id, rule FROM ({joined}) WHERE rule IS NOT NULL ORDER BY ALL"
            yield from self._connection.execute(sql, used).fetchall()
        finally:
            self._connection.unregister("built")

    def check(self, built: pa.Table) -> None:
        """Raise VerificationError for the first sample that breaks a rule."""
        for sample_id, rule in self.broken(built):
            raise VerificationError(
                f"sample {sample_id!r}: {rule}. Nothing of its part was written; this is a defect of xtoken, please "
                "report it with the sample"
            )
