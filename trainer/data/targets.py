"""A target folder as the trainer sees it: checked manifest, W, and samples read row group by row group.

Shapes: S student tokens, C chunks, K entries summed over chunks; N entries of W, V student vocabulary.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xtoken.schemas.codecs import registered
from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.heads import needed_rows, refuse_narrow_head, stated_rows
from xtoken.schemas.io.cache import Cache, cached
from xtoken.schemas.io.parquet_headers import Chunk
from xtoken.schemas.io.parquet_limits import (
    batches,
    check_footer,
    check_group,
    group_chunks,
    open_parquet,
    read_whole,
    reading,
)
from xtoken.schemas.io.remote import in_parallel, is_local, open_url, read_footer
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.manifest import Part, TargetManifest, TokenizerInfo, content_hash, part_name, read_manifest
from xtoken.schemas.missing_mass import lacking_columns, lacking_note
from xtoken.schemas.tables import CODES, VOCAB, W
from xtoken.schemas.target_form import CODES_FILE, TargetForm, TokenCodes, needs_codes
from xtoken.trainer.losses.base import ProjectionArrays, VocabArrays
from xtoken.trainer.ragged import Array

W_FILE, VOCAB_FILE = "w.parquet", "student_vocab.parquet"
_SIDE_TABLES = {W_FILE: W, VOCAB_FILE: VOCAB, CODES_FILE: CODES}
_FOOTERS = 64
_FETCH = "fetch the targets again"
_NEARLY_ALL = 0.99  # of the student's tokens: those left out are not worth a word


@dataclass(frozen=True)
class GroupRef:
    """Where a row group lies and how many samples it holds."""

    part: int
    group: int
    rows: int


@dataclass(frozen=True)
class RowGroup:
    """Some columns of one row group; a list column is (offsets [rows + 1], values), a plain one a list of one each.

    Attributes:
        whole: what has a tail mass was made to sum to 1 with it when it was read.
    """

    ref: GroupRef
    sample_ids: list[str]
    lists: Mapping[str, tuple[NDArray[Any], Array]]
    whole: bool = False

    def values(self, name: str, row: int) -> Array:
        """The list in column ``name`` of ``row``; of a plain column a list of one."""
        offsets, values = self.lists[name]
        return values[offsets[row] : offsets[row + 1]]

    def row(self, row: int) -> "RowGroup":
        """One row as a row group of its own; views."""
        lists = {
            name: (offsets[row : row + 2] - offsets[row], values[offsets[row] : offsets[row + 1]])
            for name, (offsets, values) in self.lists.items()
        }
        return RowGroup(self.ref, [self.sample_ids[row]], lists, self.whole)


class Targets:
    """A target folder or URL, opened: manifest read and row groups counted, nothing decoded.

    Of remote targets only footers are read now. Parts come through the local cache when they are needed; if all do
    not fit it (``stream``), each row group is read from where it lies, since its order visits every part all the time.

    Raises:
        XtokenError: no targets there, or none in them.
        VerificationError: a part is missing or holds another number of samples than its commit record says.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._footers: dict[int, tuple[Any, list[list[Chunk]]]] = {}
        self._lock = Lock()  # held for a look at the dictionary only
        self.manifest = read_manifest(root, TargetManifest)
        self.hash = content_hash(self.manifest)
        if sum(part.samples for part in self.manifest.parts) == 0:
            raise XtokenError(f"{root} holds no samples; check the capture and run 'xtoken align' on it again")
        self.groups = [ref for refs in in_parallel(self._groups_of, self.manifest.parts, root) for ref in refs]
        self.samples = sum(ref.rows for ref in self.groups)
        self.stream = False
        self._parts = {part.index: part for part in self.manifest.parts}
        share_cache([self])

    @cached_property
    def _form(self) -> TargetForm:
        """How the parts hold their columns; VerificationError where codes.parquet is not the one recorded."""
        manifest, codes = self.manifest, None
        if needs_codes(manifest.losses, manifest.parts_version):
            sizes = manifest.teacher_tokenizer.size, manifest.student.size
            codes = TokenCodes.of(self._side_table(CODES_FILE), *sizes)
        return TargetForm(manifest.losses, manifest.parts_version, manifest.step or 0.0, codes)

    @property
    def remote_bytes(self) -> int:
        """What the cache must hold to keep all parts."""
        return 0 if is_local(self.root) else sum(part.file_bytes for part in self.manifest.parts)

    def part(self, index: int) -> Part:
        """What the manifest says of a part."""
        return self._parts[index]

    def _path(self, part: int) -> str:
        return f"{self.root}/data/{part_name(part)}"

    def _groups_of(self, part: Part) -> list[GroupRef]:
        path = self._path(part.index)
        with reading(path, _FETCH):
            try:
                footer = read_footer(path)
            except FileNotFoundError as error:
                raise VerificationError(f"{path} is in the manifest but not on disk; {_FETCH}") from error
            check_footer(footer, path)
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
        stored = self._form.stored(columns)
        names = list(dict.fromkeys(("sample_id", *stored)))
        with reading(path, _FETCH), ExitStack() as stack:
            file = self._open(ref.part, stack)
            # nothing hashes a streamed file as a whole: pages that carry a checksum are at least checked against it
            checked = {"page_checksum_verification": True, "pre_buffer": True} if self.stream else {}
            parquet, chunks = self._footer(ref.part, file, path, checked)
            self._check_columns(parquet.schema_arrow, names, path)
            most = check_group(chunks[ref.group], file, ref.group, path, names)
            if ref.rows <= most:  # row groups are read in parallel, not their columns
                table = parquet.read_row_group(ref.group, columns=names, use_threads=False)
                table.column("sample_id").validate(full=True)  # strings that are not UTF-8
            else:
                read = batches(parquet, file, path, columns=names, groups=[ref.group], chunks=chunks)
                table = pa.Table.from_batches([batch.select(names) for batch in read])
            ids = table.column("sample_id").to_pylist()
            found = {name: _list_arrays(table.column(name)) for name in stored}
            try:
                lists = self._form.read(found, columns)
            except VerificationError as error:
                raise VerificationError(f"{path}, row group {ref.group}: {error}") from error
            self._check_ids(lists, path)
        if len(ids) != ref.rows:
            raise VerificationError(f"{path} has {len(ids)} rows in group {ref.group}, not {ref.rows}; {_FETCH}")
        return RowGroup(ref, ids, lists, self._form.lean)

    def _check_ids(self, lists: Mapping[str, tuple[NDArray[np.int32], Array]], path: str) -> None:
        """Ids index arrays, on a GPU without a look at their bounds: they must lie in their vocabulary."""
        # of student_ids the reader of samples says which sample is wrong
        student, teacher = self.manifest.student.size, self.manifest.teacher_tokenizer.size
        size_of = {"student ids": student, "shared ids": student, "ranks": student, "teacher ids": teacher}
        for schema in (LOSSES[loss] for loss in self.manifest.losses):
            ranks = [column.name for column in schema.columns if column.holds == "ranks"]
            for column in schema.columns:
                # of codes none is outside its vocabulary
                if column.name not in lists or column.holds not in size_of or column.name in self._form.otherwise:
                    continue
                size, (_, values) = size_of[column.holds], lists[column.name]
                # the end of a range of tokens may stand behind the last
                if len(values) and not (values.min() >= 0 and values.max() < size + (column.name in ranks[-1:])):
                    raise VerificationError(f"{path} has {column.name} outside 0 to {size - 1}; {_FETCH}")

    def _footer(
        self, part: int, file: Any, path: str, options: dict[str, bool]
    ) -> tuple[pq.ParquetFile, list[list[Chunk]]]:
        """A part opened, and its column chunks. Row groups are read one by one, so the last parts' footers are kept."""
        with self._lock:
            metadata, chunks = self._footers.pop(part, (None, None))
        if metadata is None or chunks is None:
            parquet = open_parquet(file, path, **options)
            chunks = group_chunks(parquet, file, path)
        else:
            parquet = pq.ParquetFile(file, metadata=metadata, **options)
        with self._lock:
            self._footers[part] = (parquet.metadata, chunks)
            if len(self._footers) > _FOOTERS:
                del self._footers[next(iter(self._footers))]
        return parquet, chunks

    def _check_columns(self, stored: pa.Schema, names: list[str], path: str) -> None:
        missing = [name for name in names if stored.get_field_index(name) < 0]
        if missing:
            raise VerificationError(f"{path} lacks the columns {', '.join(missing)}; write the targets again")
        other = [
            name
            for name in names
            if name not in self._form.schema.names or not stored.field(name).equals(self._form.schema.field(name))
        ]
        if other:
            raise VerificationError(f"{path} holds {other[0]} as {stored.field(other[0])}; {_FETCH}")

    def _open(self, part: int, stack: ExitStack) -> Any:
        url, record = self._path(part), self._parts[part]
        if self.stream:
            return stack.enter_context(open_url(url))
        # read by Arrow itself, without a lock that other threads wait for
        return stack.enter_context(pa.OSFile(stack.enter_context(cached(url, record.sha256, record.file_bytes))))

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
            XtokenError: the tail mass is needed at a temperature the capture holds no normaliser of, debiasing without
                the teacher's P(next token starts with a space), strict without any target, or what samples of teacher
                distributions cannot serve.
        """
        if registered(self.manifest.codec).linear:
            self._refuse_biased(loss, options)
        known = self.manifest.imported
        if known is not None and not known.whole_rest and loss in ("p-kl", "sparse-kl") and options.rest == "bucket":
            raise XtokenError(
                f"{self.root} is of an imported capture ({known.format}) whose tail mass nobody knows; train with "
                "--rest drop, which compares the kept entries alone"
            )
        rest = {"p-kl": "pkl_rest_logprob", "sparse-kl": "skl_rest_logprob"}.get(loss)
        if rest and options.rest == "bucket" and self.manifest.merge != "mean" and self._unknown(rest):
            raise XtokenError(
                f"{self.root} was aligned at tau={self.manifest.tau:g} from a capture without the normaliser at that "
                f"temperature, so the tail mass is unknown; train with --rest drop, or capture with --temperatures "
                f"{self.manifest.tau:g} and align again"
            )
        spaces = sum(part.counts.get("space_chunks", 0) for part in self.manifest.parts)
        if loss == "alm" and options.debias and not spaces:
            raise XtokenError(
                f"--debias {','.join(options.debias)} needs the teacher's P(next token starts with a space), which the "
                f"capture behind {self.root} does not hold; capture with --backend hf, or leave --debias out"
            )

        if loss == "strict" and all(part.counts.get("strict_chunks") == 0 for part in self.manifest.parts):
            raise XtokenError(
                f"{self.root} has no target for strict: no chunk of one token on either side has two kept entries with "
                "a student token of equal bytes; capture with a larger --k or a smaller --min-p, or take another loss"
            )

    def require_weighting(self, weighting: str) -> None:
        """Refuse weights of teachers that need what the targets do not know.

        Raises:
            XtokenError: ``ce``, where an imported capture lacks labels' log-probabilities.
        """
        known = self.manifest.imported
        if weighting == "ce" and known is not None and known.labels_unknown > 0:
            raise XtokenError(
                f"--weighting ce: {self.root} is of an imported capture ({known.format}) that does not know the "
                f"log-probability of {known.labels_unknown:.1%} of its labels; take --weighting entropy, confidence or "
                "static"
            )

    def _refuse_biased(self, loss: str, options: LossOptions) -> None:
        """Sampled frequencies are unbiased, and so are only losses whose gradient is linear in them."""
        over_draws = {
            "--kl reverse takes logarithms of what was drawn; use --kl forward": options.kl == "reverse",
            "--rest drop renormalises the student over what was drawn; use --rest bucket": options.rest == "drop",
        }
        reasons = [reason for reason, asked in over_draws.items() if asked and loss in ("p-kl", "sparse-kl")]
        if loss == "byte-prefix" and options.prefix != ["root"]:
            reasons.append("byte-prefix has no interior and child targets of draws; use --prefix root")
        if reasons:
            raise XtokenError(f"{self.root} was built from draws (codec {self.manifest.codec}): {'; '.join(reasons)}")

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

    def lacking(self, loss: str) -> str | None:
        """What ``loss`` misses of the teacher's rows at this temperature, by the first row group; None if little."""
        names = lacking_columns(loss, self.manifest.tau, self.manifest.merge)
        if not names:
            return None
        group = self.read(self.groups[0], tuple(names))
        return lacking_note(self.root, [loss], self.manifest.tau, {name: group.lists[name][1] for name in names})

    def untaught(self, loss: str) -> str | None:
        """What ``loss`` without CE leaves the student to guess: the tokens of a chunk behind its first."""
        if not LOSSES[loss].first_only or self.manifest.merge == "mean":
            return None
        parts = self.manifest.parts
        chunks = sum(part.entries for part in parts)
        tokens = sum(part.counts.get("chat_learn_tokens", part.tokens) for part in parts)
        if chunks >= _NEARLY_ALL * tokens:
            return None
        return (
            f"{self.root}: {loss} teaches the first token of each chunk, {chunks / tokens:.0%} of the student's "
            "tokens, and with --ce-weight 0 nothing teaches the others; leave --ce-weight out, or take alm or "
            "byte-prefix"
        )

    @cached_property
    def w(self) -> ProjectionArrays:
        """W, its sha256 checked."""
        table = self._side_table(W_FILE)
        for name, size in (
            ("student_id", self.manifest.student.size),
            ("teacher_id", self.manifest.teacher_tokenizer.size),
        ):
            ids = _numpy(table, name)
            if len(ids) and (ids.min() < 0 or ids.max() >= size):
                raise VerificationError(f"{W_FILE} in {self.root} has a {name} outside 0 to {size - 1}; {_FETCH}")
        student, teacher = (_numpy(table, name).astype(np.int32) for name in ("student_id", "teacher_id"))
        common, kind = _numpy(table, "common").astype(np.bool_), _numpy(table, "kind")
        equal = (kind == "exact") | ((kind == "role") & (student == self._paired_stop))
        return ProjectionArrays(student, teacher, _numpy(table, "weight").astype(np.float32), common, common & equal)

    @property
    def _paired_stop(self) -> int:
        """The student's token that ends an answer and counts as of the same bytes as the teacher's; -1: none does."""
        manifest, chat = self.manifest, self.manifest.chat
        paired = chat is not None and manifest.student.hash != manifest.teacher_tokenizer.hash
        return -1 if chat is None or chat.stop_token is None or not paired else chat.stop_token

    @cached_property
    def vocab(self) -> VocabArrays:
        """What losses ask of the student's tokens."""
        table = self._side_table(VOCAB_FILE)
        roles = table.column("role").to_pylist()
        return VocabArrays.of(table.column("bytes").to_pylist(), roles, self.manifest.space)

    @cached_property
    def needed_width(self) -> int:
        """Least width of a student's output head: one more than the highest id that text, bos or eos can have."""
        return needed_rows(self._side_table(VOCAB_FILE).column("role").to_pylist())

    def require_head(self, source: str) -> None:
        """Refuse a student whose config.json says that its head lacks tokens of text, before anything is loaded.

        Raises:
            XtokenError: see ``xtoken.schemas.heads.refuse_narrow_head``.
        """
        table = self._side_table(VOCAB_FILE)
        refuse_narrow_head(
            source, stated_rows(source), table.column("role").to_pylist(), table.column("bytes").to_pylist()
        )

    def _side_table(self, name: str) -> pa.Table:
        path, expected = f"{self.root}/{name}", str(self.manifest.files.get(name))
        try:
            # read once and kept in memory: the cache, where it cannot hold the parts, is not needed for it
            with nullcontext(path) if self.stream else cached(path, expected) as local, open_url(local) as file:
                data = file.read()
        except FileNotFoundError as error:
            raise VerificationError(f"{path} does not exist; fetch the targets again") from error
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != expected:
            raise VerificationError(
                f"{path} has sha256 {sha256[:12]}, its manifest says {expected[:12]}; fetch the targets again"
            )
        with reading(path, _FETCH):
            table = read_whole(io.BytesIO(data), path)
        if not table.schema.equals(_SIDE_TABLES[name]):
            raise VerificationError(f"{path} has columns {table.schema.names[:20]}, not those of the format; {_FETCH}")
        return table


def share_cache(folders: Sequence[Targets]) -> None:
    """Read row groups from where they lie when the remote parts of all folders together do not fit the local cache."""
    wanted = sum(folder.remote_bytes for folder in folders)
    crowded = wanted > 0 and wanted > Cache.of_environment().limit
    for folder in folders:
        folder.stream = crowded and folder.remote_bytes > 0


def _list_arrays(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], Array]:
    """Offsets [rows + 1] from 0 and values; views of what was decoded."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not pa.types.is_list(array.type):
        return np.arange(len(array) + 1, dtype=np.int32), array.to_numpy(zero_copy_only=False)
    offsets = array.offsets.to_numpy()
    return offsets - offsets[0], array.flatten().to_numpy(zero_copy_only=False)


def _numpy(table: pa.Table, name: str) -> Array:
    array: Array = table.column(name).to_numpy()
    return array
