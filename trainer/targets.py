"""A target folder as the trainer sees it: checked manifest, W, and samples read row group by row group.

Shapes: S student tokens, C chunks, K entries summed over chunks; N entries of W, V student vocabulary.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.config import LossOptions
from schemas.errors import VerificationError, XtokenError
from schemas.manifest import Part, TargetManifest, TokenizerInfo, content_hash, part_name, read_manifest
from trainer.losses.base import Array, ProjectionArrays, VocabArrays

W_FILE, VOCAB_FILE = "w.parquet", "student_vocab.parquet"
_UNTRAINED_ROLES = ("pad", "unk", "special", "hole")


@dataclass(frozen=True)
class GroupRef:
    """Where a row group lies and how many samples it holds."""

    part: int
    group: int
    rows: int


@dataclass(frozen=True)
class RowGroup:
    """Some columns of one row group; a list column is (offsets [rows + 1], values), a plain one a list of one each."""

    ref: GroupRef
    sample_ids: list[str]
    lists: Mapping[str, tuple[NDArray[np.int32], Array]]

    def values(self, name: str, row: int) -> Array:
        """The list in column ``name`` of ``row``; of a plain column a list of one."""
        offsets, values = self.lists[name]
        return values[offsets[row] : offsets[row + 1]]


class Targets:
    """A target folder or URL, opened: manifest read and row groups counted, nothing decoded.

    Raises:
        XtokenError: no targets there, or none in them.
        VerificationError: a part is missing or holds another number of samples than its commit record says.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.manifest = read_manifest(root, TargetManifest)
        self.hash = content_hash(self.manifest)
        if sum(part.samples for part in self.manifest.parts) == 0:
            raise XtokenError(f"{root} holds no samples; check the capture and run 'xtoken align' on it again")
        self.groups = [ref for part in self.manifest.parts for ref in self._groups_of(part)]
        self.samples = sum(ref.rows for ref in self.groups)

    def _path(self, part: int) -> str:
        return f"{self.root}/data/{part_name(part)}"

    def _groups_of(self, part: Part) -> list[GroupRef]:
        path = self._path(part.index)
        try:
            with fsspec.open(path, "rb") as file:
                footer = pq.read_metadata(file)
        except FileNotFoundError as error:
            raise VerificationError(f"{path} is in the manifest but not on disk; fetch the targets again") from error
        except pa.ArrowInvalid as error:
            raise VerificationError(f"{path} is no Parquet file ({error}); fetch the targets again") from error
        if footer.num_rows != part.samples:
            raise VerificationError(
                f"{path} holds {footer.num_rows} samples, its manifest says {part.samples}; fetch the targets again"
            )
        counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        return [GroupRef(part.index, group, rows) for group, rows in enumerate(counts)]

    def read(self, ref: GroupRef, columns: tuple[str, ...]) -> RowGroup:
        """Decode list columns of one row group.

        Raises:
            VerificationError: the file went away, is damaged, or lacks a column.
        """
        path = self._path(ref.part)
        try:
            with fsspec.open(path, "rb") as file:
                table = pq.ParquetFile(file).read_row_group(ref.group, columns=["sample_id", *columns])
        except (OSError, pa.ArrowException) as error:
            raise VerificationError(f"{path} cannot be read ({error}); fetch the targets again") from error
        missing = [name for name in ("sample_id", *columns) if name not in table.column_names]
        if missing:
            raise VerificationError(f"{path} lacks the columns {', '.join(missing)}; write the targets again")
        lists = {name: _list_arrays(table.column(name)) for name in columns}
        return RowGroup(ref, table.column("sample_id").to_pylist(), lists)

    def require(self, loss: str) -> None:
        """Refuse a loss these targets have no columns for.

        Raises:
            XtokenError: the targets were written for other losses.
        """
        served = ["ce", *self.manifest.losses]
        if loss not in served:
            wanted = "--for " + ",".join(dict.fromkeys([*self.manifest.losses, loss]))
            raise XtokenError(
                f"{self.root} has no columns for loss {loss!r}, it serves {', '.join(dict.fromkeys(served))}; "
                f"run 'xtoken align ... {wanted}' into a new folder"
            )

    def require_options(self, loss: str, options: LossOptions) -> None:
        """Refuse options that these targets cannot serve.

        Raises:
            XtokenError: REST is needed at a temperature the capture holds no normaliser of, or debiasing without
                the teacher's P(next token starts with a space).
        """
        rest = {"p-kl": "pkl_rest_logprob", "sparse-kl": "skl_rest_logprob"}.get(loss)
        if rest and options.rest == "bucket" and self.manifest.merge != "mean" and self._unknown(rest):
            raise XtokenError(
                f"{self.root} was aligned at tau={self.manifest.tau:g} from a capture without the normaliser at that "
                f"temperature, so REST is unknown; train with --rest drop, or capture with --temperatures "
                f"{self.manifest.tau:g} and align again"
            )
        spaces = sum(part.counts.get("space_chunks", 0) for part in self.manifest.parts)
        if loss == "alm" and options.debias and not spaces:
            raise XtokenError(
                f"--debias {','.join(options.debias)} needs the teacher's P(next token starts with a space), which the "
                f"capture behind {self.root} does not hold; capture with --backend hf, or leave --debias out"
            )

    def _unknown(self, rest_column: str) -> bool:
        group = self.read(self.groups[0], (rest_column,))
        return bool(np.isnan(group.lists[rest_column][1]).any())

    def require_student(self, tokenizer: TokenizerInfo) -> None:
        """Refuse a student of another tokenizer.

        Raises:
            XtokenError: the tokenizer hashes differ.
        """
        expected = self.manifest.student
        if tokenizer.hash != expected.hash:
            raise XtokenError(
                f"the student's tokenizer {tokenizer.name!r} ({tokenizer.hash[:12]}) is not the one {self.root} was "
                f"aligned for, {expected.name!r} ({expected.hash[:12]}); run 'xtoken align' for this student, or "
                "give a student of that tokenizer"
            )

    @cached_property
    def w(self) -> ProjectionArrays:
        """W, its sha256 checked."""
        table = self._side_table(W_FILE)
        return ProjectionArrays(
            _numpy(table, "student_id").astype(np.int32),
            _numpy(table, "teacher_id").astype(np.int32),
            _numpy(table, "weight").astype(np.float32),
            _numpy(table, "common").astype(np.bool_),
            _numpy(table, "common").astype(np.bool_) & (_numpy(table, "kind") == "exact"),
        )

    @cached_property
    def vocab(self) -> VocabArrays:
        """What losses ask of the student's tokens."""
        table = self._side_table(VOCAB_FILE)
        is_text = [role is None for role in table.column("role").to_pylist()]
        return VocabArrays.of(table.column("bytes").to_pylist(), is_text)

    @cached_property
    def needed_width(self) -> int:
        """Least width of a student's output head: one more than the highest id that text, bos or eos can have."""
        table = self._side_table(VOCAB_FILE)
        used = [i for i, role in enumerate(table.column("role").to_pylist()) if role not in _UNTRAINED_ROLES]
        return max(used, default=-1) + 1

    def _side_table(self, name: str) -> pa.Table:
        path = f"{self.root}/{name}"
        try:
            with fsspec.open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError as error:
            raise VerificationError(f"{path} does not exist; fetch the targets again") from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.manifest.files.get(name):
            raise VerificationError(
                f"{path} has sha256 {found[:12]}, its manifest says {str(self.manifest.files.get(name))[:12]}; "
                "fetch the targets again"
            )
        return pq.read_table(io.BytesIO(data))


def _list_arrays(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], Array]:
    array = column.combine_chunks()
    if not pa.types.is_list(array.type):
        return np.arange(len(array) + 1, dtype=np.int32), array.to_numpy(zero_copy_only=False)
    return array.offsets.to_numpy(), array.values.to_numpy(zero_copy_only=False)


def _numpy(table: pa.Table, name: str) -> Array:
    array: Array = table.column(name).to_numpy()
    return array
