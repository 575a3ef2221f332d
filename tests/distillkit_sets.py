"""Rows of a teacher as DistillKit writes them: a small encoder, from the formulas of its format.

Shapes: R rows, U vocabulary, K entries of a row, N ids.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

QWEN3: dict[str, Any] = {
    "k": 128,
    "exact_k": 32,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, 2],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": True,
    "normalize_t": False,
}
PLAIN: dict[str, Any] = {**QWEN3, "delta_encoding": False}
_TYPES = {"float32": "<f4", "float16": "<f2", "float64": "<f8"}


@dataclass(frozen=True)
class Document:
    """Ids as the file has them, and the row after each of them: log-probabilities of all tokens, float32 [N, U]."""

    ids: NDArray[np.int64]
    logprob: NDArray[np.float32]


def top(logprob_RU: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The most probable entries of each row, [R, K] each."""
    ids = np.argsort(-logprob_RU, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logprob_RU, ids, axis=1).astype(np.float64)


def packed_ids(ids_RK: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Ids in ceil(log2 size) bits each, most significant first."""
    bits = (size - 1).bit_length()
    field = (ids_RK[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(field.reshape(len(ids_RK), -1).astype(np.uint8), axis=1)


def packed_values(value_RK: NDArray[np.float64], config: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Head as numbers, then coefficients of the tail."""
    value = np.diff(value_RK, axis=1, prepend=0.0) if config["delta_encoding"] else value_RK
    head, tail = value[:, : config["exact_k"]], value[:, config["exact_k"] :]
    parts = [np.ascontiguousarray(head.astype(_TYPES[config["exact_dtype"]])).view(np.uint8)]
    if config["polynomial_terms"]:
        t = np.arange(tail.shape[1], dtype=np.float64)
        basis = np.stack([np.sqrt(t) if term == "sqrt" else t**term for term in config["polynomial_terms"]], axis=1)
        found = (
            np.linalg.lstsq(basis, tail.T, rcond=None)[0].T if tail.shape[1] else np.zeros((len(value), len(basis.T)))
        )
        parts.append(np.ascontiguousarray(found.astype(_TYPES[config["term_dtype"]])).view(np.uint8))
    return np.concatenate([part.reshape(len(value), -1) for part in parts], axis=1)


def sampled(document: Document, config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """One document of a sampled file: a row for each id but the last."""
    rows = document.logprob[:-1]
    ids, value = top(rows, config["k"])
    return {
        "input_ids": document.ids.tolist(),
        "compressed_logprobs": packed_values(value, config).tolist(),
        "bytepacked_indices": packed_ids(ids, size).tolist(),
    }


def packed(documents: Sequence[Document], config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A row of a packed file: of each document as many ids as rows, numbered by the mask."""
    rows: dict[str, Any] = {"attention_mask": []}
    for number, document in enumerate(documents, 1):
        made = sampled(document, config, size)
        made["input_ids"] = made["input_ids"][:-1]
        rows["attention_mask"] += [number] * len(made["input_ids"])
        for name, values in made.items():
            rows.setdefault(name, []).extend(values)
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], size: int, group: int = 2) -> Path:
    """A Parquet file of such rows, and the configuration beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    byte_lists = pa.list_(pa.list_(pa.uint8()))
    kinds = {"input_ids": pa.list_(pa.uint64()), "attention_mask": pa.list_(pa.int8())}
    names = list(rows[0])
    table = pa.table({name: pa.array([row[name] for row in rows], kinds.get(name, byte_lists)) for name in names})
    pq.write_table(table, path, row_group_size=group)
    (path.parent / "compression_config.yaml").write_text(json.dumps({"d": size, **config}))
    return path
