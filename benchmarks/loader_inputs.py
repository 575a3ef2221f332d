"""Target folders to time the loader on, made from a real one: as many entries per chunk, as many parts as asked.

``filled`` gives each chunk with entries exactly ``k``: its own, then those that stand behind it in the file, scaled so
that all of them and REST sum to 1. ``grown`` lists a folder's parts several times over, as links.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xtoken.pipeline.store.reader import target_form
from xtoken.pipeline.store.seal import side_files
from xtoken.pipeline.store.writer import write_parquet
from xtoken.schemas.manifest import TargetManifest, part_name, read_manifest

COUNT, IDS, LOGPROB, REST = "pkl_count", "pkl_ids", "pkl_logprob", "pkl_rest_logprob"


def filled(root: Path, out: Path, k: int) -> Path:
    """A copy of targets for p-kl in which every chunk that has entries has ``k``."""
    manifest = read_manifest(str(root), TargetManifest)
    form = target_form(str(root), manifest)
    (out / "data").mkdir(parents=True)
    for part in manifest.parts:
        (batch,) = pq.read_table(root / "data" / part_name(part.index)).combine_chunks().to_batches()
        changed = _filled_table(pa.Table.from_batches([form.read_batch(batch)]), k)
        stored = [form.stored_batch(batch) for batch in changed.to_batches()]
        write_parquet(str(out / "data" / part_name(part.index)), form.schema, stored)
    _finish(root, out, manifest)
    return out


def grown(root: Path, out: Path, times: int) -> Path:
    """A folder with each part ``times`` times."""
    manifest = read_manifest(str(root), TargetManifest)
    (out / "data").mkdir(parents=True)
    parts = []
    for at in range(times):
        for part in manifest.parts:
            index = at * len(manifest.parts) + part.index
            os.link(root / "data" / part_name(part.index), out / "data" / part_name(index))
            parts.append(part.model_copy(update={"index": index}))
    _finish(root, out, manifest.model_copy(update={"parts": parts}))
    return out


def _finish(root: Path, out: Path, manifest: TargetManifest) -> None:
    for name in side_files(manifest):
        shutil.copy(root / name, out / name)
    (out / "manifest.json").write_text(manifest.model_dump_json())


def _filled_table(table: pa.Table, k: int) -> pa.Table:
    columns = {name: table.column(name).combine_chunks() for name in (COUNT, IDS, LOGPROB, REST)}
    count_C, ids_K, logprob_K, rest_C = (column.flatten().to_numpy() for column in columns.values())
    starts_C = np.cumsum(count_C) - count_C
    has_C = count_C > 0
    place_FK = (starts_C[has_C, None] + np.arange(k)) % len(ids_K)
    p_FK = np.exp(logprob_K[place_FK].astype(np.float64))
    p_FK *= ((1 - np.exp(rest_C[has_C].astype(np.float64))) / p_FK.sum(1))[:, None]
    order_FK = np.argsort(-p_FK, axis=1, kind="stable")  # entries fall
    p_FK, place_FK = np.take_along_axis(p_FK, order_FK, 1), np.take_along_axis(place_FK, order_FK, 1)
    new_C = np.where(has_C, k, 0).astype(np.int32)
    chunk_R = columns[COUNT].offsets.to_numpy()
    entry_R = np.concatenate([[0], np.cumsum(new_C)])[chunk_R]
    table = _replaced(table, COUNT, chunk_R, new_C)
    table = _replaced(table, IDS, entry_R, ids_K[place_FK].ravel())
    return _replaced(table, LOGPROB, entry_R, np.log(p_FK).astype(np.float32).ravel())


def _replaced(table: pa.Table, name: str, offsets: NDArray[Any], values: NDArray[Any]) -> pa.Table:
    at = table.schema.get_field_index(name)
    kind = table.schema.field(at).type
    array = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, kind.value_type), type=kind)
    return table.set_column(at, table.schema.field(at), array)
