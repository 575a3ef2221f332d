"""Captures of any size out of a real one: its samples over and over, each a document of its own under a new id.

    python -m benchmarks.align_corpus CAPTURE OUT --tokens 1000000 --shards 8

What is written passes ``xtoken verify``: parts, commit records, manifest, plan, and the corpus that the plan describes.
"""

import argparse
import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pyarrow as pa

from xtoken.pipeline.capture.plan import PLAN_FILE, Plan, Shard, make_plan
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.columns import list_lengths
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import commit_name, data_name, publish_part
from xtoken.pipeline.store.reader import iter_parquet, records
from xtoken.pipeline.store.seal import SIDE_FILES, seal
from xtoken.pipeline.store.writer import ROW_GROUP, write_parquet
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.manifest import MANIFEST, CaptureManifest, Part, provenance, read_manifest
from xtoken.schemas.ui.progress import Silent


def stored_batches(capture: str) -> list[pa.RecordBatch]:
    """Every row as it is stored (codes, not ids), but for windows of blanks, which would be no documents."""
    folder = Folder(capture)
    batches = [batch for index in sorted(records(capture)) for batch in iter_parquet(folder.url(data_name(index)))]
    return [
        batch.filter(pa.array([bool(text.strip()) for text in batch["text"].to_pylist()], pa.bool_()))
        for batch in batches
    ]


def repeated(batches: list[pa.RecordBatch], tokens: int) -> Iterator[pa.RecordBatch]:
    """The rows over and over until there are so many teacher tokens, each under an id of its own."""
    taken = number = 0
    for copy in count():
        for batch in batches:
            if taken >= tokens:
                return
            names = [f"{copy}/{number + at}#0" for at in range(batch.num_rows)]
            number += batch.num_rows
            taken += int(list_lengths(batch, "teacher_ids").sum())
            at = batch.schema.get_field_index("sample_id")
            yield batch.set_column(at, batch.schema.field(at), pa.array(names, pa.string()))


def corpus_and_plan(batches: list[pa.RecordBatch], file: Path, tokens: int, shards: int) -> Plan:
    """Write the corpus of these samples and plan it in about so many shards of equal text."""
    size = 0
    with file.open("w", encoding="utf-8") as out:
        for batch in repeated(batches, tokens):
            pairs = zip(batch["sample_id"].to_pylist(), batch["text"].to_pylist(), strict=True)
            for name, text in pairs:
                size += len(text.encode())
                document = {"id": name.rpartition("#")[0], "text": text}
                out.write(json.dumps(document, ensure_ascii=False) + "\n")
    config = CorpusConfig(corpus=str(file), id_field="id")
    return make_plan(config, -(-size // shards), Silent())


def by_shard(rows: Iterator[pa.RecordBatch], shards: list[Shard]) -> Iterator[tuple[Shard, pa.Table]]:
    """The rows of each shard; a document is one row."""
    held: list[pa.RecordBatch] = []
    for shard in shards:
        while sum(batch.num_rows for batch in held) < shard.documents:
            held.append(next(rows))
        table = pa.Table.from_batches(held)
        yield shard, table.slice(0, shard.documents)
        held = table.slice(shard.documents).to_batches()


def build(capture: str, out: Path, tokens: int, shards: int) -> int:
    """Write a capture of about so many tokens and shards; returns its tokens."""
    source, batches = read_manifest(capture, CaptureManifest), stored_batches(capture)
    folder = Folder(str(out))
    folder.make("")
    link(Path(capture), out, SIDE_FILES["capture"])
    plan = corpus_and_plan(batches, out.parent / f"{out.name}.jsonl", tokens, shards)
    folder.create(PLAN_FILE, plan.model_dump_json(indent=1).encode() + b"\n")
    check = CaptureCheck.of(source)
    parts = [write_part(out, shard, table, check) for shard, table in by_shard(repeated(batches, tokens), plan.shards)]
    update = {**provenance(), "parts": parts, "corpus": plan.corpus, "plan_hash": plan.hash, "audits": []}
    finish(folder, source.model_copy(update=update))
    return sum(part.tokens for part in parts)


def write_part(out: Path, shard: Shard, table: pa.Table, check: CaptureCheck) -> Part:
    """Write, check and commit one part."""
    counts = {"documents": shard.documents, "snapped": sum(table["snapped"].to_pylist())}

    def write(url: str) -> dict[str, int]:
        write_parquet(url, check.schema, table.cast(check.schema).to_batches(ROW_GROUP))
        return counts

    return publish_part(str(out), shard.index, write, check)


def head(capture: Path, out: Path, tokens: int) -> int:
    """The first parts of a capture of ``build``, hard links to its files, until there are so many tokens."""
    source, folder = read_manifest(str(capture), CaptureManifest), Folder(str(out))
    folder.make("data", "commits")
    parts: list[Part] = []
    while sum(part.tokens for part in parts) < tokens and len(parts) < len(source.parts):
        parts.append(source.parts[len(parts)])
    names = [name(part.index) for part in parts for name in (data_name, commit_name)]
    link(capture, out, (*names, *SIDE_FILES["capture"]))
    plan = Plan.model_validate_json((capture / PLAN_FILE).read_bytes())
    plan = plan.model_copy(update={"shards": plan.shards[: len(parts)]})
    folder.create(PLAN_FILE, plan.model_dump_json(indent=1).encode() + b"\n")
    finish(folder, source.model_copy(update={"parts": parts, "plan_hash": plan.hash}))
    return sum(part.tokens for part in parts)


def link(source: Path, out: Path, names: tuple[str, ...]) -> None:
    """Hard links, or copies where the file system is another."""
    for name in names:
        try:
            os.link(source / name, out / name)
        except OSError:
            (out / name).write_bytes((source / name).read_bytes())


def finish(folder: Folder, manifest: CaptureManifest) -> None:
    """Write the manifest and SHA256SUMS."""
    folder.replace(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    seal(folder.root)


def main() -> None:
    """Build one capture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--shards", type=int, default=8)
    options = parser.parse_args()
    print(f"{build(options.capture, options.out, options.tokens, options.shards):,} tokens")


if __name__ == "__main__":
    main()
