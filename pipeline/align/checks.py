"""What must hold in every part of targets before it is published, said in SQL (``sql/check``). A breach is a defect.

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

from xtoken.pipeline.align.chunks import Joined
from xtoken.pipeline.align.kernels_targets import masses
from xtoken.pipeline.align.queries import query
from xtoken.pipeline.align.rows import Recipe
from xtoken.pipeline.align.targets import Maps
from xtoken.pipeline.store.columns import flat, list_lengths
from xtoken.schemas.errors import VerificationError

# What a chunk's (byte-prefix: a token's) entries add up to: its name, counts and log-probabilities, and REST.
_MASSES = {
    "p-kl": (("pkl_mass", (("pkl_count", "pkl_logprob"),), "pkl_rest_logprob"),),
    "h-kl": (
        ("hkl_mass", (("hkl_common_count", "hkl_common_logprob"), ("hkl_other_count", "hkl_other_logprob")), None),
    ),
    "gold": (("gold_mass", (("gold_count", "gold_logprob"), ("gold_other_count", "gold_other_logprob")), None),),
    "uld": (("uld_mass", (("uld_count", "uld_logprob"),), None),),
    "byte-prefix": (
        ("prefix_mass", (("prefix_count", "prefix_logprob"),), "prefix_rest_logprob"),
        ("child_mass", (("child_count", "child_logprob"),), None),
    ),
    "sparse-kl": (("skl_mass", (("skl_count", "skl_logprob"),), "skl_rest_logprob"),),
}
# Columns of which the smallest and largest of each sample are judged, the largest, and those that are.
_IDS = ("student_ids", "pkl_ids", "hkl_common_ids", "gold_ids", "prefix_ids", "child_low", "child_high", "skl_ids")
_LOGPROBS = ("teacher_logprob", "factor_logprob", "alm_space_logprob")
_AS_THEY_ARE = ("sample_id", "student_ids", "student_end", "chunk_student_end", "chunk_teacher_end")
_CONFIDENCE = ("teacher_entropy", "teacher_top1")


def summary_batch(
    batch: pa.RecordBatch, samples: Sequence[Joined], found: pa.RecordBatch, losses: Sequence[str]
) -> pa.Table:
    """What ``Rules`` judges, a row per sample: its tokens and chunks, and the extremes of everything else.

    Args:
        batch: of ``CaptureParts.read``.
        samples: those of the batch that are aligned.
        found: their targets.
        losses: that the targets serve.
    """
    columns: dict[str, Any] = {name: found[name] for name in (*_AS_THEY_ARE, *_CONFIDENCE)}
    columns["teacher_end"] = batch["teacher_end"].take(pa.array([sample.at for sample in samples], pa.int64()))
    lead_N = np.array([sample.chunks.lead for sample in samples], np.int32)
    columns["lead"] = pa.array(lead_N)
    columns["student_end_step"] = _least_step(found, "student_end", np.zeros_like(lead_N))
    for name in ("chunk_student_end", "chunk_teacher_end"):
        columns[f"{name}_step"] = _least_step(found, name, lead_N)
    present = set(found.schema.names)
    for name in present.intersection(_IDS):
        lengths_N, values = list_lengths(found, name), flat(found, name)
        columns[f"{name}_low"] = _reduced(np.minimum, values, lengths_N)
        columns[f"{name}_high"] = _reduced(np.maximum, values, lengths_N)
    for name in present.intersection(_LOGPROBS):
        columns[f"{name}_high"] = _greatest(flat(found, name), list_lengths(found, name))
    if "child_low" in present:
        width_K = flat(found, "child_high") - flat(found, "child_low")
        columns["child_range_low"] = _reduced(np.minimum, width_K, list_lengths(found, "child_low"))
    for loss in losses:
        for name, parts, rest in _MASSES.get(loss, ()):
            columns.update(_masses(found, name, parts, rest))
    return pa.table(columns)


def _reduced(by: np.ufunc, values: NDArray[Any], lengths_N: NDArray[np.int64]) -> pa.Array:
    """One value for each sample's consecutive ``lengths_N`` ones, [N]; null where it has none."""
    filled_N = lengths_N > 0
    found_N = np.zeros(len(lengths_N), values.dtype)
    if filled_N.any():
        found_N[filled_N] = by.reduceat(values, (np.cumsum(lengths_N) - lengths_N)[filled_N])
    return pa.array(found_N, mask=~filled_N)


def _greatest(values: NDArray[Any], lengths_N: NDArray[np.int64]) -> pa.Array:
    """The largest number of each sample's values, [N]; null where it has none but NaN."""
    found = _reduced(np.fmax, values, lengths_N)
    return pc.if_else(pc.is_nan(found), pa.scalar(None, found.type), found)


def _least_step(found: pa.RecordBatch, name: str, spared_N: NDArray[np.int32]) -> pa.Array:
    """The least that a list of ends goes up by, from 0 on, [N]; ``spared_N`` is added to the first step of each."""
    lengths_N, values = list_lengths(found, name), flat(found, name)
    step = np.diff(values, prepend=values[:0].dtype.type(0))
    first_N, filled_N = np.cumsum(lengths_N) - lengths_N, lengths_N > 0
    step[first_N[filled_N]] = values[first_N[filled_N]] + spared_N[filled_N]
    return _reduced(np.minimum, step, lengths_N)


def _masses(
    found: pa.RecordBatch, name: str, parts: Sequence[tuple[str, str]], rest: str | None
) -> dict[str, pa.Array]:
    """Extremes of what the entries of some columns add up to with REST where it is known, of REST and of counts."""
    lengths_N = list_lengths(found, parts[0][0])
    total_C = np.sum([masses(flat(found, count), np.exp(flat(found, logprob))) for count, logprob in parts], axis=0)
    columns = {}
    if rest is not None:
        rest_C = flat(found, rest)
        unknown_C = np.isnan(rest_C)
        total_C = total_C + np.where(unknown_C, 0.0, np.exp(rest_C.astype(np.float64)))
        columns[f"{rest}_high"] = _greatest(rest_C, lengths_N)
        columns[f"{rest}_unknown"] = _reduced(np.add, unknown_C.astype(np.int32), lengths_N)
    for count, _ in parts:
        columns[f"{count}_low"] = _reduced(np.minimum, flat(found, count), lengths_N)
    columns[f"{name}_low"] = _reduced(np.minimum, total_C, lengths_N)
    columns[f"{name}_high"] = _reduced(np.maximum, total_C, lengths_N)
    return columns


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
            "rest_unknown": self.recipe.tau != 1 and not self.recipe.rest_known,
        }
        texts = [query(f"check/{name}") for name in ("base", *(loss for loss in self.recipe.losses if loss != "ce"))]
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
