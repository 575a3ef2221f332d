"""What must hold in every part of targets before it is published, said in SQL (``sql/check``). A breach is a defect.

What has an element per entry is too much to hold until a part is whole, so numpy and a kernel boil it down to figures
per sample and per chunk first; SQL judges them.

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

from pipeline.align.chunks import Joined
from pipeline.align.kernels_targets import masses
from pipeline.align.queries import query
from pipeline.align.rows import Recipe
from pipeline.align.targets import Maps
from pipeline.store.columns import flat, list_lengths
from schemas.errors import VerificationError
from schemas.tables import target_columns

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
_IDS = ("pkl_ids", "hkl_common_ids", "gold_ids", "prefix_ids", "child_low", "child_high", "skl_ids")


def summary_batch(
    batch: pa.RecordBatch, samples: Sequence[Joined], found: pa.RecordBatch, losses: Sequence[str]
) -> pa.Table:
    """What ``Rules`` judges: columns of a batch of targets but the entries, and what these boil down to.

    Args:
        batch: of ``CaptureParts.read``.
        samples: those of the batch that are aligned.
        found: their targets.
        losses: that the targets serve.
    """
    whole = [name for name, axis in target_columns(losses) if axis in ("sample", "token", "chunk")]
    columns: dict[str, Any] = {name: found[name] for name in whole}
    at = pa.array([sample.at for sample in samples], pa.int64())
    columns["teacher_byte"] = batch["teacher_end"].take(at)
    for name in set(found.schema.names).intersection(_IDS):
        columns[f"{name}_low"], columns[f"{name}_high"] = _extremes(found, name)
    if "child_low" in columns or "child_low" in found.schema.names:
        columns["child_narrowest"] = _least(found, "child_low", flat(found, "child_high") - flat(found, "child_low"))
    for loss in losses:
        for name, parts, rest in _MASSES.get(loss, ()):
            columns[name] = _mass(found, parts, rest)
    return pa.table(columns)


def _extremes(found: pa.RecordBatch, name: str) -> tuple[pa.Array, pa.Array]:
    """Smallest and largest of each sample's ids, [N]; null where it has none."""
    values = flat(found, name)
    low = _least(found, name, values)
    return low, pc.negate(_least(found, name, -values.astype(np.int64)))


def _least(found: pa.RecordBatch, name: str, values: NDArray[Any]) -> pa.Array:
    """Smallest of each sample's ``values``, which are as many as its elements of column ``name``, [N]; or null."""
    lengths_N = list_lengths(found, name)
    starts_N = np.cumsum(lengths_N) - lengths_N
    least_N = np.zeros(len(lengths_N), np.int64)
    filled = lengths_N > 0
    if filled.any():
        least_N[filled] = np.minimum.reduceat(values, starts_N[filled])
    return pa.array(least_N, mask=~filled)


def _mass(found: pa.RecordBatch, parts: Sequence[tuple[str, str]], rest: str | None) -> pa.Array:
    """What the entries of some columns, and REST where it is known, add up to; a list per sample."""
    total_C = np.sum([masses(flat(found, count), flat(found, logprob)) for count, logprob in parts], axis=0)
    if rest is not None:
        total_C = total_C + np.nan_to_num(np.exp(flat(found, rest).astype(np.float64)))
    offsets = np.concatenate([[0], np.cumsum(list_lengths(found, parts[0][0]))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(total_C))


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
