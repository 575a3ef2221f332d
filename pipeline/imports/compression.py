"""How DistillKit's rows are compressed: its configuration as we read it, and a row's bytes back to log-probabilities.

The bytes have no header, so the configuration is an input; ``distillkit.py`` tests whether it is the right one. All is
computed in float64, which agrees with the toolkit's float32 within 3e-6 nats. Formulas: docs/format.md does not have
them, since the format is not ours; they are facts of DistillKit a61c2e7.

Shapes: R rows, K entries of a row, B bytes of a row, n entries of the tail, T polynomial terms.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xtoken.pipeline.imports.packed_bits import index_bits, packed_bytes, unpack_bytes
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.remote import open_url

MOST_ENTRIES, MOST_BITS = 4096, 32
_FILE_BYTES = 1 << 20
Kind = Literal["float16", "bfloat16", "float32", "float64"]
Term = int | Literal["sqrt", "exp"]
_WIDTH: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_HALF = ("float16", "bfloat16")
Floats = NDArray[np.float64]


class ResidualBin(BaseModel):
    """Corrections of some entries behind the head, in whole numbers of a scale of their own."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    scale_dtype: Kind = "float32"
    element_bits: int = Field(ge=1, le=16)
    num_elements: int = Field(ge=1, le=MOST_ENTRIES)

    @property
    def bytes(self) -> int:
        """Of a row."""
        return _WIDTH[self.scale_dtype] + packed_bytes(self.num_elements, self.element_bits)


class Compression(BaseModel):
    """The toolkit's configuration; names are its own."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    d: int = Field(ge=1, le=1 << MOST_BITS, description="ids are below it")
    k: int = Field(ge=1, le=MOST_ENTRIES, description="entries of a row")
    exact_k: int = Field(ge=0, le=MOST_ENTRIES, description="of them, those stored as numbers: the head")
    exact_dtype: Kind = "float32"
    polynomial_terms: list[Term] | None = Field(None, max_length=64)
    term_dtype: Kind = "float32"
    residual_bins: list[ResidualBin] = Field(default_factory=list, max_length=64)
    delta_encoding: bool = Field(True, description="true where a file does not say, as in the toolkit")
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is more than k {self.k}")
        for term in self.polynomial_terms or ():
            if isinstance(term, int) and not 0 <= term <= 64:
                raise ValueError(f"the power {term} is not 0 to 64")
        return self

    @property
    def terms(self) -> list[Term]:
        """Of the polynomial, in the order of their coefficients."""
        return self.polynomial_terms or []

    @property
    def tail(self) -> int:
        """Entries behind the head."""
        return self.k - self.exact_k

    @property
    def bits(self) -> int:
        """Of an id."""
        return index_bits(self.d)

    @property
    def value_bytes(self) -> int:
        """Of a row of ``compressed_logprobs``."""
        numbers = self.exact_k * _WIDTH[self.exact_dtype] + len(self.terms) * _WIDTH[self.term_dtype]
        return numbers + sum(one.bytes for one in self.residual_bins)

    @property
    def index_bytes(self) -> int:
        """Of a row of ``bytepacked_indices``."""
        return packed_bytes(self.k, self.bits)

    def ids(self, data_RB: NDArray[np.uint8]) -> tuple[NDArray[np.int64], bool]:
        """int64 [R, K] of ``bytepacked_indices``, and whether the padding behind them is 0."""
        return unpack_bytes(data_RB, self.k, self.bits)

    def head(self, data_RB: NDArray[np.uint8]) -> Floats:
        """float64 [R, exact_k], nats: what is stored as numbers, most probable first."""
        head = _floats(data_RB[:, : self.exact_k * _WIDTH[self.exact_dtype]], self.exact_dtype)
        return _sums(head) if self.delta_encoding else head

    def values(self, data_RB: NDArray[np.uint8], *, as_toolkit: bool = False) -> Floats:
        """float64 [R, K], nats, the polynomial's included; perhaps not finite, and not falling.

        Args:
            data_RB: of ``compressed_logprobs``.
            as_toolkit: with the rounding of sums of deltas to ``exact_dtype``, which loses up to .03 nats.
        """
        stop = self.exact_k * _WIDTH[self.exact_dtype]
        head, at = _floats(data_RB[:, :stop], self.exact_dtype), stop
        stop = at + len(self.terms) * _WIDTH[self.term_dtype]
        tail = self._polynomial(_floats(data_RB[:, at:stop], self.term_dtype))
        tail += self._residual(data_RB[:, stop:])
        value = np.concatenate([head, tail], axis=1)
        if not self.delta_encoding:
            return value
        return rounded_to(self.exact_dtype, _sums(value)) if as_toolkit else _sums(value)

    def _polynomial(self, coefficient_RT: Floats) -> Floats:
        if not self.tail or not self.terms:
            return np.zeros((len(coefficient_RT), self.tail))
        if self.term_dtype in _HALF:
            return self._half(coefficient_RT)
        t = np.arange(self.tail, dtype=np.float64)
        if self.normalize_t:
            t /= max(1, self.tail - 1)
        with np.errstate(all="ignore"):
            basis = np.stack([_term(term, t) for term in self.terms])
            # one term after the other: a product of matrices adds in an order of its own
            total = np.zeros((len(coefficient_RT), self.tail))
            for at in range(len(self.terms)):
                total += coefficient_RT[:, at, None] * basis[at]
        return total

    def _half(self, coefficient_RT: Floats) -> Floats:
        """The same where each step is rounded to 16 bits."""
        kind, n = self.term_dtype, self.tail
        t = rounded_to(kind, np.arange(n, dtype=np.float64))
        if self.normalize_t:
            step, place = rounded_to(kind, np.array([1 / max(1, n - 1)]))[0], np.arange(n)
            t = rounded_to(kind, np.where(place < n / 2, place * step, 1 - (n - 1 - place) * step))
        total = np.zeros((len(coefficient_RT), n))
        with np.errstate(all="ignore"):
            for at, term in enumerate(self.terms):
                basis = _half_term(term, t, kind)
                total += rounded_to(kind, coefficient_RT[:, at, None] * basis)
        return rounded_to(kind, total)

    def _residual(self, data_RB: NDArray[np.uint8]) -> Floats:
        found, at, entry = np.zeros((len(data_RB), self.tail)), 0, 0
        for one in self.residual_bins:
            width = _WIDTH[one.scale_dtype]
            scale_R1 = _floats(data_RB[:, at : at + width], one.scale_dtype)
            found_level, _ = unpack_bytes(data_RB[:, at + width : at + one.bytes], one.num_elements, one.element_bits)
            level: NDArray[np.int64] = (
                2 * found_level - 1 if one.element_bits == 1 else found_level - (1 << (one.element_bits - 1))
            )
            stop = min(self.tail, entry + one.num_elements)
            found[:, entry:stop] = (level * scale_R1)[:, : stop - entry]
            at, entry = at + one.bytes, stop
        return rounded_to(self.exact_dtype, found) if self.residual_bins else found


def _floats(data_RB: NDArray[np.uint8], kind: Kind) -> Floats:
    """Numbers of some bytes, little-endian, float64 [R, numbers]."""
    data = np.ascontiguousarray(data_RB)
    if kind == "bfloat16":
        words = data.view("<u2").astype(np.uint32) << np.uint32(16)
        return words.view(np.float32).astype(np.float64)
    return data.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[kind]).astype(np.float64)


def rounded_to(kind: str, value: Floats) -> Floats:
    """The nearest numbers of a type, ties to even, as float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        if kind != "bfloat16":
            return value.astype({"float16": np.float16, "float32": np.float32}.get(kind, np.float64)).astype(np.float64)
        bits = value.astype(np.float32).view(np.uint32)
        near = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        kept = (near & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isfinite(value), kept, value).astype(np.float64)


def _sums(value_RK: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.cumsum(value_RK, axis=1)


def _term(term: Term, t: Floats) -> Floats:
    if term == "sqrt":
        return np.sqrt(t)
    return np.exp(t) if term == "exp" else t**term


def _half_term(term: Term, t: Floats, kind: Kind) -> Floats:
    """bfloat16 multiplies cubes product by product."""
    if term == 3 and kind == "bfloat16":
        return rounded_to(kind, rounded_to(kind, t * t) * t)
    return rounded_to(kind, _term(term, t))


class LegacyCompression(BaseModel):
    """The toolkit's older form: packed words, and columns of numbers."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    vocab_size: int = Field(ge=2, le=1 << MOST_BITS)
    k: int = Field(ge=1, le=MOST_ENTRIES)
    exact_k: int = Field(ge=0, le=MOST_ENTRIES)
    polynomial_degree: int = Field(ge=0, le=64)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Kind = "float32"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is more than k {self.k}")
        return self

    @property
    def tail(self) -> int:
        """Entries behind the head."""
        return self.k - self.exact_k

    @property
    def bits(self) -> int:
        """Of an id."""
        return index_bits(self.vocab_size)

    @property
    def words(self) -> int:
        """Of a row of ``packed_indices``."""
        return -(-self.k // (64 // self.bits))

    @property
    def coefficients(self) -> int:
        """Of a row of ``coeffs``; a row without a tail may have any number."""
        return self.polynomial_degree + 1 + self.with_sqrt_term

    def tail_values(self, coefficient_RT: Floats) -> Floats:
        """float64 [R, n], nats: ranks count from 1 here."""
        t = np.arange(1, self.tail + 1, dtype=np.float64)
        total = np.zeros((len(coefficient_RT), self.tail))
        for power in range(self.polynomial_degree + 1):
            basis = t ** float(-power if self.invert_polynomial else power)
            total += coefficient_RT[:, power, None] * basis
        if self.with_sqrt_term:
            total += coefficient_RT[:, self.polynomial_degree + 1, None] * np.sqrt(t)
        return total


AnyCompression = Compression | LegacyCompression


def read_compression(path: str) -> AnyCompression:
    """A configuration file: the toolkit's ``compression_config.yaml``, or a training example that holds it.

    Raises:
        XtokenError: it is missing, no YAML or JSON, or holds no configuration.
    """
    import yaml

    try:
        with open_url(path) as file:
            text = file.read(_FILE_BYTES + 1)
        if len(text) > _FILE_BYTES:
            raise ValueError(f"it has more than {_FILE_BYTES} bytes")
        if b"&" in text and b"*" in text:  # a few lines of aliases can stand for more than memory holds
            raise ValueError("it has aliases")
        found = yaml.safe_load(text.decode())
    # a tag that does not fit its value ('!!bool x') gives KeyError or AttributeError
    except (OSError, ValueError, KeyError, AttributeError, yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise XtokenError(f"{path} cannot be read as YAML ({said}); give the set's compression_config.yaml") from error
    return compression_of(found, path)


def compression_of(value: Any, path: str) -> AnyCompression:
    """The configuration in a parsed file, wherever in it.

    Raises:
        XtokenError: there is none, or it contradicts itself.
    """
    for found in _sections(value):
        kind = Compression if "d" in found else LegacyCompression
        try:
            return kind.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ": ".join([".".join(map(str, first["loc"])), ""]) if first["loc"] else ""
            said = first["msg"].removeprefix("Value error, ")
            raise XtokenError(f"{path}: {where}{said} (it is {str(first['input'])[:80]!r}); mend it") from error
    raise XtokenError(
        f"{path} holds no compression settings: neither d, k and exact_k, nor vocab_size, k and polynomial_degree; "
        "the set's card or training example has them"
    )


def _sections(value: Any, depth: int = 0) -> list[dict[str, Any]]:
    """Objects that look like a configuration, outer ones first."""
    if not isinstance(value, dict) or depth > 4:
        return []
    mine = [value] if {"k", "exact_k"} <= value.keys() and {"d", "vocab_size"} & value.keys() else []
    return mine + [one for inner in value.values() for one in _sections(inner, depth + 1)]


def beside(file: str) -> str:
    """Where the toolkit writes the configuration of a data file."""
    return f"{file.rsplit('/', 1)[0]}/compression_config.yaml" if "/" in file else "compression_config.yaml"


def named(path: str) -> str:
    """A file's own name."""
    return PurePath(path).name
