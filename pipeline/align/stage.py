"""One part of a capture to one part of targets: DuckDB reads, the student encodes, the kernels build.

The kernels are fed Arrow batches rather than registered as DuckDB functions: a chunk's target needs the student's
tokens, which come from Python anyway, so a function inside the query would add a second crossing and save none.
Memory stays bounded by the batch (32 samples) and by DuckDB's own limit, whatever the corpus.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.align.checks import check_samples, check_targets
from pipeline.align.chunks import join
from pipeline.align.queries import query
from pipeline.align.rows import Recipe
from pipeline.align.targets import Maps, target_batch
from pipeline.align.texts import CorpusTexts, refuse_without_text
from pipeline.capture.work import OneByOne, Tell, tell_nobody
from pipeline.project.projection import Projection, Unreached
from pipeline.store.checks import CaptureCheck
from pipeline.store.codes import restore_ids
from pipeline.store.columns import flat
from pipeline.store.files import Folder, StopRun
from pipeline.store.left_out import LeftOut
from pipeline.store.publish import publish_part
from pipeline.store.reader import ids_of_codes, load_vocab, local_part, records
from pipeline.store.unpack import row_columns
from pipeline.store.verify import TargetCheck
from pipeline.store.writer import ROW_GROUP, group_rows, write_parquet
from pipeline.tokens import Encoded, TextTokenizer, load_tokenizer
from schemas.config import AlignConfig
from schemas.errors import VerificationError, XtokenError
from schemas.manifest import CaptureManifest, CodecInfo, Part, TokenizerInfo, read_manifest
from schemas.tables import targets


@dataclass(frozen=True)
class AlignJob:
    """What a worker process needs; small enough to send, W is in arrays.

    Attributes:
        capture: folder or URL of the one that is aligned.
        out: folder or URL of its targets.
        codec: how the capture stored its rows.
        teacher_eos: the teacher's eos id.
    """

    config: AlignConfig
    capture: str
    out: str
    projection: Projection
    codec: CodecInfo
    teacher_eos: int | None

    @property
    def ahead(self) -> int:
        """See ``Job``: parts are built one at a time."""
        return 1

    def open(self, slot: int = 0) -> "AlignWorker":  # noqa: ARG002
        """Load the student's tokenizer and prepare W and, for byte-prefix, the teacher's vocabulary.

        Raises:
            XtokenError: the tokenizer is no longer the one W was built for.
            VerificationError: the capture's vocabulary is damaged.
        """
        config = self.config
        tokenizer = load_tokenizer(config.student)
        refuse_other_tokenizer("student", tokenizer.table.info, self.projection.student)
        unreached: Unreached = config.unreached
        teacher = load_vocab(self.capture) if "byte-prefix" in config.losses else None
        maps = Maps.of(self.projection, unreached, tokenizer.table, teacher)
        texts = CorpusTexts(self.capture, config.corpus) if config.corpus else None
        return AlignWorker(self, tokenizer, maps, Recipe(config.losses, config.merge, config.tau, self.codec), texts)


def refuse_other_tokenizer(side: str, found: TokenizerInfo, wanted: TokenizerInfo) -> None:
    """Raise XtokenError unless both are the same tokenizer by hash."""
    if found.hash != wanted.hash:
        raise XtokenError(
            f"the {side} tokenizer {found.name} ({found.hash[:12]}) is not the one W was built for, "
            f"{wanted.name} ({wanted.hash[:12]}); build W for this pair with 'xtoken project', or leave --w out"
        )


@dataclass(frozen=True)
class AlignWorker(OneByOne):
    """Builds target parts; part n of the targets is part n of the capture."""

    job: AlignJob
    tokenizer: TextTokenizer
    maps: Maps
    recipe: Recipe
    texts: CorpusTexts | None

    def run(self, shard: int, attempt: int, tell: Tell = tell_nobody) -> Part:
        """Build, publish and commit one part; the attempt's number does not enter its content.

        Raises:
            XtokenError: the capture part cannot be read within the memory limit, or holds no text.
        """
        del attempt, tell  # a part is done within seconds
        config = self.job.config
        return publish_part(self.job.out, shard, partial(self._write, shard), TargetCheck(config.losses))

    def _write(self, shard: int, url: str) -> dict[str, int]:
        counts: Counter[str] = Counter(samples_skipped=0)
        rows = group_rows(records(self.job.capture)[shard].samples)
        write_parquet(url, targets(self.job.config.losses), self._batches(shard, counts), rows)
        return dict(counts)

    def _batches(self, shard: int, counts: Counter[str]) -> Iterator[pa.RecordBatch]:
        config = self.job.config
        eos_id = self.tokenizer.table.info.eos_id
        texts = None if self.texts is None else self.texts.part(shard)
        for read in read_part(self.job.capture, shard, config.memory_limit, self.job.teacher_eos):
            batch = read if texts is None else texts.fill(read)
            refuse_without_text(batch, self.job.capture)
            _refuse_foreign_ids(batch, (row_columns(self.job.codec)[1], "teacher_ids"), self.maps.teacher_size)
            encoded = encode(self.tokenizer, batch)
            samples = join(batch, encoded, eos_id)
            check_samples(batch, samples)
            found, figures = target_batch(batch, samples, self.maps, self.recipe)
            check_targets(found, self.maps, config.tau, drawn=self.recipe.drawn)
            counts.update(figures)
            counts["samples_skipped"] += batch.num_rows - len(samples)
            yield found


def _refuse_foreign_ids(batch: pa.RecordBatch, names: Sequence[str], size: int) -> None:
    """Raise VerificationError when an id is outside the teacher's vocabulary (compiled loops do not look)."""
    for name in names:
        ids = flat(batch, name)
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            raise VerificationError(
                f"the part of sample {batch['sample_id'][0].as_py()!r} has an id outside 0 to {size - 1} in {name}; "
                "'xtoken verify' on the capture lists what is damaged"
            )


def read_part(capture: str, part: int, memory_limit: str, eos_id: int | None) -> Iterator[pa.RecordBatch]:
    """Batches of ``sql/read_part.sql`` in file order, within a memory limit, with the teacher's ids in the place of
    codes; what a subset left out is filled in.

    Raises:
        StopRun: the part needs more memory than the limit.
        XtokenError: the part is missing or damaged.
    """
    import duckdb

    manifest = read_manifest(capture, CaptureManifest)
    left_out, check, id_of_code = LeftOut.of(manifest), CaptureCheck.of(manifest), ids_of_codes(capture)
    limits: dict[str, Any] = {"memory_limit": memory_limit, "threads": 1, "temp_directory": ""}
    try:
        with local_part(Folder(capture), part) as path, duckdb.connect(config=limits) as connection:
            check.file(path)
            found: Any = connection.sql(query("read_part"), params={"path": path, "eos_id": eos_id})
            for batch in found.to_arrow_reader(ROW_GROUP):
                check.batch(batch)
                yield left_out.fill(restore_ids(batch, id_of_code))
    except duckdb.OutOfMemoryException as error:
        raise StopRun(
            f"part {part} of {capture} does not fit --memory-limit {memory_limit}; give more, or capture with a "
            "smaller --shard-bytes"
        ) from error
    except duckdb.Error as error:
        raise XtokenError(
            f"part {part} of {capture} cannot be read ({error}); 'xtoken verify {capture}' lists what is damaged"
        ) from error


def encode(tokenizer: TextTokenizer, batch: pa.RecordBatch) -> list[Encoded | None]:
    """The student's tokens of each sample, in the bytes of the stored text; None where that cannot be.

    A sample closes with eos when its document does, as ``complete`` of the capture says.
    """
    texts, completes = batch["text"].to_pylist(), batch["complete"].to_pylist()
    try:
        found: list[Encoded | None] = list(tokenizer.encode_batch(texts, completes, keep_text=True))
    except XtokenError:
        found = [_encode_one(tokenizer, text, complete) for text, complete in zip(texts, completes, strict=True)]
    return [one if one is not None and one.text == text else None for one, text in zip(found, texts, strict=True)]


def _encode_one(tokenizer: TextTokenizer, text: str, complete: bool) -> Encoded | None:
    try:
        return tokenizer.encode(text, complete=complete, keep_text=True)
    except XtokenError:
        return None
