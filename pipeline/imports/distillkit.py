"""DistillKit's sets: its present form, its older one, raw top k, and open-instruct's copy; which of them files are."""

from dataclasses import replace

import numpy as np

from xtoken.pipeline.imports.compression import (
    MOST_ENTRIES,
    AnyCompression,
    Compression,
    LegacyCompression,
    beside,
    read_compression,
)
from xtoken.pipeline.imports.conversations import Chats, has_template
from xtoken.pipeline.imports.distillkit_reader import DistillKitReader
from xtoken.pipeline.imports.distillkit_rows import NEEDED, RowDecoder, Variant
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.parquet_rows import (
    ParquetRows,
    list_files,
)
from xtoken.pipeline.imports.samples import Source
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.imported import RestClass
from xtoken.schemas.io.remote import open_filesystem

_ALWAYS, _PERHAPS = ("input_ids",), ("attention_mask", "normalized_logits", "messages")
_HINT = "is --compression that of the set (delta_encoding is true where it does not say)?"
_PART_OF_ALL = 1e-3  # nats: a softmax over what is listed adds up to 1 far closer
_CENTRED = 1.0  # nats: log-probabilities never add up to e, logits do


def open_reader(config: ImportConfig, spelling: Spelling, form: str) -> DistillKitReader:
    """Open the files; see ``xtoken.pipeline.imports.FORMATS``.

    Raises:
        XtokenError: there are none, they are of another format, or nobody says how they are compressed.
    """
    files = list_files(config.paths, (".parquet",))
    rows = ParquetRows(files, (*_ALWAYS, *_PERHAPS), _ALWAYS)
    variant = _variant(rows)
    needed = (*_ALWAYS, *NEEDED[variant])
    rows = ParquetRows(files, (*needed, *_PERHAPS), needed)
    compression = None if variant == "raw top k" else _compression(config, files[0].path, variant)
    chats = None
    if form != "text":
        chats = Chats.of_ids(config) if form == "ids" else Chats.of_messages(config, "all")
    source = Source(
        format=variant,
        files=tuple(one.path for one in files),
        rest=_rest(config, compression),
        config={} if compression is None else compression.model_dump(mode="json"),
        k=MOST_ENTRIES if compression is None else compression.k,
        chat=None if chats is None else chats.info,
        notes=_notes(config, compression),
        hint=_HINT if compression is not None else Source.hint,
    )
    decoder = RowDecoder(variant, compression, whole=config.entries == "all")
    reader = DistillKitReader(source, config, spelling, rows, decoder, chats)
    if variant == "distillkit":
        return reader
    if variant == "raw top k" and "normalized_logits" in rows.schema().names:
        over_all = replace(reader, decoder=replace(decoder, normalised=True))
        if _first_sum(over_all) < -_PART_OF_ALL:  # over the vocabulary: what is listed is a part of 1
            return replace(over_all, source=replace(source, rest="rounded"))
    if _first_sum(reader) > _CENTRED:
        notes = (*source.notes, "The rows hold logits: what is not listed is not known.")
        source = replace(source, rest="unknown", notes=notes)
        return replace(reader, decoder=replace(decoder, logits=True), source=source)
    return reader


def guess_form(config: ImportConfig) -> str | None:
    """messages where rows have their conversation and the tokenizer has a template; else the ids must say."""
    rows = ParquetRows(list_files(config.paths, (".parquet",)), ("messages",), ())
    if "messages" not in rows.schema().names:
        return None
    for wanted in rows.slices(config.part_bytes)[:1]:
        for _, batch in rows.read(wanted):
            rows.close()
            given = any(batch["messages"].to_pylist())
            return "messages" if given and has_template(config.tokenizer) else None
    return None


def _variant(rows: ParquetRows) -> Variant:
    names = set(rows.schema().names)
    for variant, needed in NEEDED.items():
        if names >= {*needed, *_ALWAYS}:
            return variant
    raise XtokenError(
        f"{rows.files[0].path} is no DistillKit set: its columns are {', '.join(sorted(names)[:12])}, and such sets "
        "have input_ids with compressed_logprobs and bytepacked_indices, with packed_indices, exact_values and coeffs, "
        "or with token_ids and top_values; for axolotl's say 'xtoken import axolotl'"
    )


def _compression(config: ImportConfig, file: str, variant: Variant) -> AnyCompression:
    path = config.compression
    if path is None:
        fs, inner = open_filesystem(beside(file))
        if not fs.exists(inner):
            raise XtokenError(
                f"{beside(file)} does not exist, and the rows do not say how they are compressed; give the settings "
                "with --compression FILE: they are in the set's compression_config.yaml, its card or a training example"
            )
        path = beside(file)
    found = read_compression(path)
    if isinstance(found, Compression) != (variant == "distillkit"):
        wanted = "d, k, exact_k" if variant == "distillkit" else "vocab_size, k, polynomial_degree"
        raise XtokenError(f"{path} is of another form than {file}, which needs {wanted}; give that set's own")
    if config.entries == "head" and found.exact_k == 0:
        raise XtokenError(
            f"{path}: exact_k is 0, so no entry is stored as a number and --entries head keeps none; say --entries all"
        )
    return found


def _rest(config: ImportConfig, how: AnyCompression | None) -> RestClass:
    if how is None:
        return "unknown"
    if isinstance(how, LegacyCompression):
        return "rounded"
    whole = config.entries == "head" or how.exact_k == how.k
    return "exact" if whole and how.exact_dtype in ("float32", "float64") else "rounded"


def _notes(config: ImportConfig, how: AnyCompression | None) -> tuple[str, ...]:
    if how is not None and config.entries == "head" and how.exact_k <= 4:
        return (
            f"Only {how.exact_k} of {how.k} entries of each row are numbers, the others a polynomial's: what is left "
            "is honest, and there is little to learn from it.",
        )
    return ()


def _first_sum(reader: DistillKitReader) -> float:
    """Median of the log of what the first rows' entries add up to; of logits far above 0."""
    for wanted in reader.slices():
        for first, batch in reader.rows.read(wanted):
            place = f"{reader.rows.files[wanted.file].name}:{first}"
            listed = reader.decoded(batch, 0, place).listed
            if len(listed):
                reader.rows.close()
                return float(np.median(listed))
    return 0.0
