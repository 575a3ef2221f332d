"""Which tokens have small codes in targets: those that the teacher's distributions hold often.

Small numbers leave the upper bytes of a column empty. The capture's own codes count the tokens of its text; entries are
other tokens, and their own counts save a sixth of the bytes of ids.

Shapes: U teacher vocabulary, V student vocabulary.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xtoken.pipeline.project.projection import EXACT, ROLE, Projection, Unreached
from xtoken.pipeline.store.checks import CaptureCheck, refuse_other_columns
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codes import Codes
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.reader import ids_of_codes, local_part, stored_columns
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.io.parquet_limits import batches, open_parquet, reading
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.manifest import CaptureManifest
from xtoken.schemas.target_form import TokenCodes

# Row groups that are looked at: 1,024 samples, which know the frequent tokens of a corpus.
_PARTS, _GROUPS = 8, 4
T = TypeVar("T")
_RARE = 1e-3  # what a student token without a teacher token of its own bytes counts


def token_codes(root: str, capture: CaptureManifest, projection: Projection, unreached: Unreached) -> TokenCodes:
    """Codes for targets of a capture through W.

    The student's tokens are counted through W: how often a token's own counterpart stands in the teacher's rows.
    """
    id_of_code = ids_of_codes(root)
    use_U = _moved(_use(root, capture, id_of_code), projection.routes(unreached))
    # of tokens that are not there, those that the text holds often come first
    teacher = np.arange(len(use_U), dtype=np.int32) if id_of_code is None else id_of_code
    teacher = teacher[np.argsort(-use_U[teacher], kind="stable")]
    own = np.isin(projection.kind, (EXACT, ROLE))
    weight = np.where(own, 1.0, _RARE) * projection.weight * use_U[projection.teacher_id]
    use_V = np.bincount(projection.student_id, weights=weight, minlength=projection.student.size)
    return TokenCodes(teacher, np.argsort(-use_V, kind="stable").astype(np.int32))


def _use(root: str, capture: CaptureManifest, id_of_code: Codes | None) -> NDArray[np.int64]:
    """How often each teacher token is an entry, [U], in some row groups from all over the capture."""
    count_U = np.zeros(capture.tokenizer.size, np.int64)
    schema = CaptureCheck.of(capture).schema
    stored = stored_columns(open_codec(capture.codec).id_columns, id_of_code) or []
    names = [name for name in stored if name in schema.names]
    for batch in _some(root, capture, schema, names):
        for name in names:
            ids = flat(batch, name)
            # what is no token of the vocabulary is refused where its part is read
            count_U += np.bincount(ids[(ids >= 0) & (ids < len(count_U))], minlength=len(count_U))
    return count_U if id_of_code is None else _by_id(count_U, id_of_code)


def _moved(use_U: NDArray[np.int64], route_U: NDArray[np.int32]) -> NDArray[np.int64]:
    """Counts where targets have the entries: at the token that takes the mass of one that W does not reach."""
    here = route_U >= 0
    moved_U = np.zeros_like(use_U)
    np.add.at(moved_U, route_U[here], use_U[here])
    return moved_U


def _by_id(count: NDArray[np.int64], id_of_code: Codes) -> NDArray[np.int64]:
    count_U = np.empty_like(count)
    count_U[id_of_code] = count
    return count_U


def _some(root: str, capture: CaptureManifest, schema: pa.Schema, names: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of a few row groups of a few parts, evenly spread; the stage says which parts are damaged."""
    parts = _spread([part for part in capture.parts if part.samples], _PARTS) if names else []
    for part in parts:
        name, folder = f"part {part.index} of {root}", Folder(root)
        with (
            suppress(VerificationError),
            local_part(folder, part.index, part) as path,
            reading(name, ""),
            open_url(path) as file,
        ):
            parquet = open_parquet(file, name)
            refuse_other_columns(parquet, schema)
            groups = _spread(list(range(parquet.metadata.num_row_groups)), _GROUPS)
            yield from batches(parquet, file, name, columns=names, groups=groups)


def _spread(items: list[T], most: int) -> list[T]:
    """Up to ``most`` of them, in order, evenly spread."""
    return [items[at] for at in sorted({round(at) for at in np.linspace(0, len(items) - 1, min(most, len(items)))})]
