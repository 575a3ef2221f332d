"""Rows as other toolkits decode them, and configurations that are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.distillkit_sets import packed_ids
from tests.unit.pipeline.imports.sets import golden, numbers
from xtoken.pipeline.imports.compression import Compression, LegacyCompression, compression_of, read_compression
from xtoken.pipeline.imports.packed_bits import unpack_bytes, unpack_words
from xtoken.schemas.errors import XtokenError

BYTES = [
    *("dk_recommended_1k", "dk_recommended_152k", "dk_budget_1k", "dk_budget_152k", "dk_budget_delta_152k"),
    *("dk_qwen3_1k", "dk_qwen3_152k", "dk_qwen3_nodelta_152k", "dk_exact8_152k", "dk_exact8_delta_1k", "dk_k8_1k"),
    *("dk_bins_152k", "dk_bins_delta_1k", "dk_bins_odd_1k", "dk_normt_1k", "dk_noexact_1k", "oi_default_1k"),
    *("dirty_1k", "dirty_delta_1k", "packed_1k"),
]
# The toolkit's own float32 sum of terms that cancel is that far off.
LEGACY = {"legacy_dclm_152k": 2e-3, "legacy_logprob_1k": 1e-5, "legacy_exact8_1k": 1e-5}
ABSOLUTE, RELATIVE = 1e-5, 1e-6  # the goldens have 7 digits, and were computed in float32


@pytest.mark.parametrize("name", BYTES)
def test_rows_of_bytes_decode_as_the_toolkit_decodes_them(name: str) -> None:
    said, rows = golden(name)
    how = compression_of(said["config"], name)
    assert isinstance(how, Compression)
    assert how.bits == said["index_bits"]
    for row, wanted in zip(rows, said["samples"], strict=True):
        ids, whole = how.ids(np.array(row["bytepacked_indices"], np.uint8))
        assert whole
        assert ids.tolist() == wanted["ids"]
        data = np.array(row["compressed_logprobs"], np.uint8)
        assert data.shape[1] == how.value_bytes
        found = how.values(data, as_toolkit=True)
        np.testing.assert_allclose(found, numbers(wanted["logprob"]), atol=ABSOLUTE, rtol=RELATIVE)
        if not how.delta_encoding:
            np.testing.assert_array_equal(how.head(data), found[:, : how.exact_k])


@pytest.mark.parametrize("name", LEGACY)
def test_rows_of_the_older_form_decode_as_the_toolkit_decodes_them(name: str) -> None:
    said, rows = golden(name)
    how = compression_of(said["config"], name)
    assert isinstance(how, LegacyCompression)
    for row, wanted in zip(rows, said["samples"], strict=True):
        words = np.array(row["packed_indices"], np.uint64)
        assert words.shape[1] == how.words
        assert unpack_words(words, how.k, how.bits).tolist() == wanted["ids"]
        found = np.array(row["exact_values"])
        if how.tail:
            found = np.concatenate([found, how.tail_values(np.array(row["coeffs"], np.float64))], axis=1)
        key = "value" if "value" in wanted else "logprob"
        np.testing.assert_allclose(found, numbers(wanted[key]), atol=LEGACY[name], rtol=RELATIVE)


@given(st.integers(2, 262_145), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_ids_of_any_width_come_back(size: int, count: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, size, (3, count))
    bits = (size - 1).bit_length()
    found, whole = unpack_bytes(packed_ids(ids, size), count, bits)
    assert whole
    np.testing.assert_array_equal(found, ids)


def test_bits_behind_the_last_id_are_seen() -> None:
    assert unpack_bytes(np.array([[0b1011_0001]], np.uint8), 1, 3) == (np.array([[0b101]]), False)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "holds no compression settings"),
        ({"d": 9, "k": 4, "exact_k": 5}, "exact_k 5 is more than k 4"),
        ({"d": 9, "k": 5000, "exact_k": 5}, "k: Input should be less than or equal to 4096"),
        ({"d": 9, "k": 4, "exact_k": 1, "exact_dtype": "int8"}, "exact_dtype"),
        ({"d": 9, "k": 4, "exact_k": 1, "polynomial_terms": [-1]}, "the power -1"),
    ],
)
def test_settings_that_are_none(found: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(found))
    with pytest.raises(XtokenError, match=said):
        read_compression(str(path))


def test_settings_within_a_training_example_are_found(tmp_path: Path) -> None:
    path = tmp_path / "train.yml"
    path.write_text("teacher:\n  kind: dataset\n  logprob_compressor:\n    d: 10\n    k: 4\n    exact_k: 2\n")
    found = read_compression(str(path))
    assert isinstance(found, Compression)
    assert (found.d, found.k, found.exact_k, found.delta_encoding) == (10, 4, 2, True)


@pytest.mark.parametrize("text", [b"\xff", b"a: &x [1]\nb: *x\n", b"[" * 10_000, b"{" * 500, b"x" * (1 << 21)])
def test_files_that_are_no_settings(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(XtokenError, match=r"c.yaml"):
        read_compression(str(path))
