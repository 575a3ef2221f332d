"""What views need beside SQL, as functions of DuckDB over Arrow columns.

Running sums inside flat lists are the work of a window or of nested lists in SQL: on real rows both take many times the
time of these functions, and a window does not fit a gigabyte.

Shapes: N samples of one call, R rows, K entries, S tokens, C chunks, all samples together; V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.base import Codec
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.target_form import TargetForm

Ints = NDArray[np.int64]
_UNSPELLED = 0x3F  # '?'
_DAMAGED = "'xtoken verify' lists what is damaged"


@dataclass(frozen=True)
class Function:
    """A function as DuckDB is told of it: types of arguments and result are DuckDB's, by name."""

    call: Callable[..., pa.Array]
    takes: tuple[str, ...]
    gives: str


def functions() -> dict[str, Function]:
    """Those that need nothing of the folder, by name."""
    return {
        "places": Function(places, ("INTEGER[]", "INTEGER"), "STRUCT(place INTEGER[], rank INTEGER[])"),
        "steps": Function(steps, ("INTEGER[]", "INTEGER"), "INTEGER[]"),
        "readable": Function(readable, ("BLOB",), "VARCHAR"),
    }


def row_functions(codec: Codec) -> dict[str, Function]:
    """``unpack_rows`` of a capture's codec."""
    gives = "STRUCT(place INTEGER[], rank INTEGER[], logprob DOUBLE[])"
    return {"unpack_rows": Function(UnpackRows(codec), codec.sql_types, gives)}


def target_functions(form: TargetForm) -> dict[str, tuple[str, str, Function]]:
    """What makes each column of targets that is stored otherwise than it is read: SQL, the function's name, and it."""
    found = {}
    for name in form.otherwise:
        stored = form.stored([name])
        types = tuple(f"{_DUCKDB[str(form.schema.field(one).type.value_type)]}[]" for one in stored)
        gives = "INTEGER[]" if name.endswith("_ids") else "FLOAT[]"
        function = f"read_{name}"
        call = _OF_SO_MANY[len(stored)](ReadTargets(form, name, tuple(stored)))
        found[name] = f"{function}({', '.join(stored)})", function, Function(call, types, gives)
    return found


def readable(raw: pa.Array) -> pa.Array:
    """Bytes as text; what is not UTF-8 is written like \\xe6."""
    column = _array(raw)
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        shown = (None if value is None else value.decode("utf-8", "backslashreplace") for value in column.to_pylist())
        return pa.array(shown, pa.string())


def places(counts: pa.Array, sizes: pa.Array) -> pa.Array:
    """For each entry of a flat list the number of its place, and its rank there, both from 0.

    Args:
        counts: [N] lists: entries of each place.
        sizes: [N] entries of each sample.

    Raises:
        VerificationError: the counts of a sample do not sum to its entries.
    """
    lists = _Lists.of(counts)
    place_K, rank_K, size_N = _places(lists, _sizes(sizes))
    return _struct_of_lists(size_N, {"place": place_K.astype(np.int32), "rank": rank_K.astype(np.int32)})


def steps(ends: pa.Array, sizes: pa.Array) -> pa.Array:
    """For each of a sample's tokens the number of the chunk it is in; null behind the last chunk.

    Args:
        ends: [N] lists: index after the last token of each chunk.
        sizes: [N] tokens of each sample.

    Raises:
        VerificationError: the ends of a sample decrease, or go beyond its tokens.
    """
    lists, size_N = _Lists.of(ends), _sizes(sizes)
    last_N = np.zeros(len(size_N), np.int64)
    filled_N = lists.length_N > 0
    last_N[filled_N] = lists.values[lists.stop_N[filled_N] - 1]
    count_C = lists.values - np.concatenate([np.zeros(1, np.int64), lists.values[:-1]])[: len(lists.values)]
    first_N = (lists.stop_N - lists.length_N)[filled_N]
    count_C[first_N] = lists.values[first_N]
    if (count_C < 0).any() or (last_N > size_N).any():
        raise VerificationError(f"chunks of a sample do not fit its tokens; {_DAMAGED}")
    number_C = np.arange(len(count_C)) - np.repeat(lists.stop_N - lists.length_N, lists.length_N)
    # the tokens behind the last chunk are one more of each sample, without a number
    count = np.insert(count_C, lists.stop_N, size_N - last_N)
    number = np.insert(number_C, lists.stop_N, -1)
    chunk_S = np.repeat(number, count).astype(np.int32)
    return _list(size_N, pa.array(chunk_S, mask=chunk_S < 0))


@dataclass(frozen=True)
class UnpackRows:
    """Rows of a capture as log-probabilities: place (row of the sample), rank, and logprob of each entry.

    Raises:
        VerificationError: the lists of a sample do not fit each other.
    """

    codec: Codec

    def __call__(self, counts: pa.Array, codes: pa.Array, values: pa.Array) -> pa.Array:
        """Args: entries of each row, their tokens and the codec's values, of [N] samples."""
        lists, stored = _Lists.of(counts), _Lists.of(values)
        place_K, rank_K, size_N = _places(lists, stored.length_N)
        if (_Lists.of(codes).length_N != size_N).any():
            raise VerificationError(f"a sample has not as many ids as entries; {_DAMAGED}")
        columns: dict[str, NDArray[Any]] = {
            "place": place_K.astype(np.int32),
            "rank": rank_K.astype(np.int32),
            "logprob": self.codec.sql_logprob(lists.values, stored.values),
        }
        return _struct_of_lists(size_N, columns)


# DuckDB counts the parameters of a function.
_OF_SO_MANY: dict[int, Callable[[Callable[..., pa.Array]], Callable[..., pa.Array]]] = {
    1: lambda read: lambda a: read(a),
    2: lambda read: lambda a, b: read(a, b),
    3: lambda read: lambda a, b, c: read(a, b, c),
}
_DUCKDB = {"int32": "INTEGER", "uint16": "USMALLINT", "float": "FLOAT"}


@dataclass(frozen=True)
class ReadTargets:
    """A list column of targets as readers see it, from those on disk that hold it.

    Raises:
        VerificationError: the lists of a sample do not fit each other, or a code is outside its vocabulary.
    """

    form: TargetForm
    name: str
    stored: tuple[str, ...]

    def __call__(self, *columns: pa.Array) -> pa.Array:
        """Args: the columns of ``stored``, of [N] samples."""
        whole = [_array(column) for column in columns]
        lists = {
            name: (_offsets(_lengths(one)).to_numpy(), one.flatten().to_numpy(zero_copy_only=False))
            for name, one in zip(self.stored, whole, strict=True)
        }
        offsets, values = self.form.read(lists, [self.name])[self.name]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


@dataclass(frozen=True)
class Lookup:
    """The value of a token: an array with one for each id (or code), taken at ids.

    A join would do the same, but DuckDB takes the entries for the smaller side, and holds them all.
    """

    values: pa.Array = field(repr=False)
    gives: str

    @property
    def function(self) -> Function:
        """A function of an id; null of null."""
        return Function(self, ("INTEGER",), self.gives)

    def __call__(self, ids: pa.Array) -> pa.Array:
        """Args: [N] ids.

        Raises:
            VerificationError: one is outside the vocabulary.
        """
        column = _array(ids)
        try:
            return self.values.take(column)
        except pa.ArrowIndexError as error:
            raise VerificationError(f"an id is outside 0 to {len(self.values) - 1}; {_DAMAGED}") from error


@dataclass(frozen=True)
class Join:
    """What the tokens of a list spell, one after the other, as text.

    Attributes:
        pieces: bytes of each token, in id order.
    """

    pieces: pa.Array = field(repr=False)

    @property
    def function(self) -> Function:
        """``teacher_tokens_text(ids)``."""
        return Function(self, ("INTEGER[]",), "VARCHAR")

    def __call__(self, ids: pa.Array) -> pa.Array:
        """Args: [N] lists of ids.

        Raises:
            VerificationError: one is outside the vocabulary.
        """
        whole = _array(ids)
        offsets = _offsets(_lengths(whole))
        pieces = Lookup(self.pieces, "BLOB")(whole.flatten())
        return readable(pc.binary_join(pa.ListArray.from_arrays(offsets, pieces), b""))


@dataclass(frozen=True)
class Spell:
    """What tokens say, in bytes: the vocabulary's, cut at the front to the token's width in the text.

    (Some tokenizers put a space before the text that is not there.) Where a normaliser changed the text, a token may
    be wider than its bytes: '?' stands for each missing one.

    Attributes:
        data: uint8, the bytes of all tokens, in id order.
        offsets: int64 [V + 1].
    """

    data: NDArray[np.uint8] = field(repr=False)
    offsets: Ints = field(repr=False)

    @property
    def function(self) -> Function:
        """``spelled(ids, ends)``."""
        return Function(self, ("INTEGER[]", "INTEGER[]"), "BLOB")

    def __call__(self, ids: pa.Array, ends: pa.Array) -> pa.Array:
        """The bytes of [N] samples.

        Raises:
            VerificationError: an id is outside the vocabulary, or the ends of a sample decrease or are not one per id.
        """
        tokens, stops = _Lists.of(ids), _Lists.of(ends)
        id_S, end_S = tokens.values, stops.values
        if (tokens.length_N != stops.length_N).any() or (id_S < 0).any() or (id_S >= len(self.offsets) - 1).any():
            raise VerificationError(f"a sample's student_ids are not ids of the student's; {_DAMAGED}")
        filled_N = tokens.length_N > 0
        width_S = np.diff(end_S, prepend=np.int64(0))
        first_N = (tokens.stop_N - tokens.length_N)[filled_N]
        width_S[first_N] = end_S[first_N]
        size_N = np.zeros(len(filled_N), np.int64)
        size_N[filled_N] = end_S[tokens.stop_N[filled_N] - 1]
        if (width_S < 0).any() or size_N.sum() > _LARGEST:
            raise VerificationError(f"a sample's student_end is not a list of growing ends; {_DAMAGED}")
        return pa.Array.from_buffers(
            pa.binary(), len(size_N), [None, _offsets(size_N).buffers()[1], pa.py_buffer(self._gather(id_S, width_S))]
        )

    def _gather(self, id_S: Ints, width_S: Ints) -> bytes:
        """Byte j of a token as wide as its text stands ``width - j`` before the end of the token's bytes."""
        stop_S = np.cumsum(width_S)
        left = np.repeat(stop_S, width_S) - np.arange(int(stop_S[-1]) if len(stop_S) else 0)
        at = np.repeat(self.offsets[id_S + 1], width_S) - left
        missing = at < np.repeat(self.offsets[id_S], width_S)
        spelt = self.data[np.where(missing, 0, at)] if len(self.data) else np.zeros(len(at), np.uint8)
        spelt = np.where(missing, np.uint8(_UNSPELLED), spelt)
        return spelt.tobytes()


_LARGEST = 1 << 30  # bytes, or entries, of the samples of one call


@dataclass(frozen=True)
class _Lists:
    """A list column: [N] lengths, and their running sum; all values in one array."""

    length_N: Ints
    stop_N: Ints
    values: Ints

    @classmethod
    def of(cls, column: pa.Array) -> "_Lists":
        whole = _array(column)
        length_N = _lengths(whole)
        values = whole.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(length_N, np.cumsum(length_N), values)


def _array(column: Any) -> pa.Array:
    """DuckDB hands over chunked arrays."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _lengths(column: pa.Array) -> Ints:
    length_N: Ints = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return length_N


def _sizes(column: pa.Array) -> Ints:
    size_N: Ints = pc.fill_null(_array(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return size_N


def _places(counts: _Lists, size_N: Ints) -> tuple[Ints, Ints, Ints]:
    """Place and rank of each entry [K], and entries of each sample [N]."""
    count = counts.values
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    sum_N = running[counts.stop_N] - running[counts.stop_N - counts.length_N]
    if (count < 0).any() or (sum_N != size_N).any() or size_N.sum() > _LARGEST:
        raise VerificationError(f"counts of a sample do not sum to its entries; {_DAMAGED}")
    number = np.arange(len(count)) - np.repeat(counts.stop_N - counts.length_N, counts.length_N)
    rank_K = np.arange(int(running[-1])) - np.repeat(running[:-1], count)
    return np.repeat(number, count), rank_K, size_N


def _offsets(length_N: Ints) -> pa.Array:
    return pa.array(np.concatenate([np.zeros(1, np.int64), np.cumsum(length_N)]).astype(np.int32))


def _list(length_N: Ints, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(_offsets(length_N), values)


def _struct_of_lists(length_N: Ints, columns: dict[str, NDArray[Any]]) -> pa.Array:
    return pa.StructArray.from_arrays([_list(length_N, pa.array(v)) for v in columns.values()], list(columns))
