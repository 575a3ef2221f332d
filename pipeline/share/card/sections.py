"""The parts of a card that say what one capture is: facts, counts, fidelity, alignment, limits."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from xtoken.pipeline.share.card.alignment import Alignment
from xtoken.pipeline.share.card.markup import code, plain, public
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.row_stats import RowStats
from xtoken.pipeline.store.figures import audits_line, capture_figures, chat_figures
from xtoken.pipeline.store.left_out import without_rows
from xtoken.schemas.manifest import CaptureManifest, content_hash
from xtoken.schemas.ui.progress import brief

_NAMED = 5


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are written for people."""
    lines = [head, ["---"] * len(head), *([brief(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"* {line}" for line in lines)


def facts(manifest: CaptureManifest) -> str:
    """Teacher, tokenizer, rows, corpus, origin."""
    teacher, tokenizer, corpus = manifest.teacher, manifest.tokenizer, manifest.corpus
    context = "BOS before each" if manifest.bos else "without BOS"
    lines = [
        f"**Teacher**: {code(public(teacher.model))}, revision {code(teacher.revision or 'not recorded')}, "
        f"{_precision(manifest)}",
        f"**Engine**: {code(teacher.backend)} {code(teacher.engine_version)} on {code(teacher.device)}, rows taken by "
        f"{code(teacher.capture_path)}",
        f"**Tokenizer**: {code(tokenizer.name)}, {tokenizer.size:,} ids, hash {code(tokenizer.hash)}",
        f"**Context**: samples of at most {manifest.max_tokens:,} tokens, {context}, each scored on its own (the model "
        f"takes {teacher.context:,})",
        f"**Rows**: {rows_stored(manifest)}",
        *_conversations(manifest),
        f"**Corpus**: {code(public(corpus.source))}, {corpus.documents:,} documents, {corpus.text_bytes:,} bytes, hash "
        f"{code(corpus.hash)}",
        *([f"**Audited**: {audits_line(manifest.audits, code)}"] if manifest.audits else []),
        *_origins(manifest),
        f"**Content hash**: {code(content_hash(manifest))}; schema version {manifest.schema_version}, xtoken "
        f"{code(manifest.xtoken_version)}",
    ]
    return bullets(lines)


def _conversations(manifest: CaptureManifest) -> list[str]:
    """How conversations became samples; nothing of plain text."""
    chat = manifest.chat
    if chat is None:
        return []
    ends = "an answer ends with " + ("no token" if chat.stop_token is None else f"token {chat.stop_token}")
    if chat.template is None:
        return [f"**Token ids**: scored as the corpus has them, and its masks mark what is taught; {ends}"]
    asked = chat.answering
    taught = {"all": "every answer", "last": "the last answer", "each": "every answer, each in a sample of its own"}
    given = "".join(f", {code(name)} {code(value)}" for name, value in list(chat.arguments.items())[:_NAMED])
    too_long = "lose their last messages" if chat.long == "cut" else "are left out"
    own = [] if asked is None else [
        f"**Answers**: the teacher's own, {asked.samples:,} to each prompt, of at most {asked.tokens:,} tokens, at "
        f"temperature {asked.temperature:g} and top-p {asked.top_p:g}, seed {asked.seed}"
    ]  # fmt: skip
    what = taught[chat.turns] if asked is None else "the teacher's own answer"
    return [
        f"**Conversations**: read from the form {code(chat.form)}; taught is {what}, of it "
        f"{', '.join(chat.learn)}; those that are too long {too_long}",
        *own,
        f"**Chat template**: sha256 {code(chat.template)}, for the date {code(chat.date)}{given}; {ends}",
    ]


def _precision(manifest: CaptureManifest) -> str:
    teacher = manifest.teacher
    quantized = f", quantised by {code(teacher.quantization)}" if teacher.quantization else ""
    hashes = [("config", teacher.config_hash), ("weights", teacher.weights_hash)]
    named = "".join(f", {name} hash {code(value)}" for name, value in hashes if value)
    return f"in {code(teacher.dtype)} with a head in {code(teacher.head_dtype)}{quantized}{named}"


def _origins(manifest: CaptureManifest) -> list[str]:
    lines = []
    for origin in manifest.derived_from[:_NAMED]:
        chosen = [("parts", origin.parts), ("samples where", origin.where)]
        named = "".join(f", {name} {code(value)}" for name, value in chosen if value)
        lines.append(f"**Made from** the capture with content hash {code(origin.content_hash)}{named}")
    more = len(manifest.derived_from) - _NAMED
    return [*lines, *([f"**Made from** {more} captures more, see `manifest.json`"] if more > 0 else [])]


def rows_stored(manifest: CaptureManifest) -> str:
    """What of each row the capture holds, in words."""
    if without_rows(manifest.left_out):
        return "none; only the log-probability of each token in the text"
    return open_codec(manifest.codec).sentence


def schema(manifest: CaptureManifest) -> pa.Schema:
    """The capture's table."""
    return CaptureCheck.of(manifest).schema


def counts(manifest: CaptureManifest) -> str:
    """Samples, tokens, rows, bytes."""
    figures = capture_figures(manifest)
    parts = manifest.parts
    rows: list[tuple[str, object]] = [
        ("samples", figures["samples"]),
        ("tokens", figures["tokens"]),
        ("rows", figures["rows"]),
        ("text, bytes", figures["text_bytes"]),
        ("files in data/", len(parts)),
        ("files in data/, bytes", sum(part.file_bytes for part in parts)),
        ("bytes per token", figures["bytes_per_token"]),
    ]
    if manifest.chat is not None:
        rows[1:3] = _taught(manifest)
    if not without_rows(manifest.left_out):
        rows.insert(
            [name for name, _ in rows].index("text, bytes"),
            (open_codec(manifest.codec).entries_label, figures["entries_per_row"]),
        )
    return table(["", "count"], rows)


def _taught(manifest: CaptureManifest) -> list[tuple[str, object]]:
    """Tokens, and what of them is taught."""
    figures = chat_figures(manifest)
    return [
        ("answers taught", figures["taught_turns"]),
        ("tokens", sum(part.tokens for part in manifest.parts)),
        ("share of the tokens that is taught", f"{figures['share_of_tokens_taught']:.1%}"),
        ("rows, one for each taught token", sum(part.rows for part in manifest.parts)),
        *((f"of them {plain(kind)}", count) for kind, count in figures["taught_tokens"].items()),
    ]


def columns(manifest: CaptureManifest, sizes: Mapping[str, float]) -> str:
    """Each column's type, bytes per token and meaning."""
    rows = [
        (f"`{field.name}`", str(field.type).replace("<element: ", " of ").replace(" not null>", ""),
         f"{sizes.get(field.name, 0.0):.2f}", (field.metadata or {}).get(b"doc", b"").decode().replace("|", "or"))
        for field in schema(manifest)
    ]  # fmt: skip
    return table(["column", "type", "bytes", "holds"], rows)


def _known(bits: float) -> float | str:
    """A figure of all labels; of an import that lacks some there is none."""
    return "not known: labels outside the source's entries have no log-probability" if math.isnan(bits) else bits


def fidelity(manifest: CaptureManifest, stats: RowStats) -> str:
    """What the rows keep of the teacher's distribution."""
    if not stats.rows:
        return "There are no rows."
    rows: list[tuple[str, object]] = [("teacher's bits per byte of this text", _known(stats.bits_per_byte))]
    notes: list[str] = []
    if not without_rows(manifest.left_out):
        of_codec, note = open_codec(manifest.codec).fidelity(stats)
        rows, notes = rows + of_codec, [note]
    return "\n\n".join([table(["", "measured on all rows"], rows), *notes])


def alignment(manifest: CaptureManifest, found: Sequence[Alignment]) -> str:
    """How students' tokens meet the teacher's: chunks, and those of one token on either side."""
    rows = [
        (code(one.student), one.samples, _percent(one.one_to_one, one.chunks), _ratio(one.text_bytes, one.chunks),
         _ratio(one.text_bytes, one.student_tokens))
        for one in found
    ]  # fmt: skip
    summed: Counter[str] = Counter()
    for part in manifest.parts:
        summed.update(part.counts)
    if not rows and summed["chunks"]:
        text_bytes = sum(part.text_bytes for part in manifest.parts)
        rows = [
            ("given when it was captured", sum(part.samples for part in manifest.parts),
             _percent(summed["chunks_1_1"], summed["chunks"]), _ratio(text_bytes, summed["chunks"]),
             _ratio(text_bytes, summed["student_tokens"]))
        ]  # fmt: skip
    if not rows and manifest.chat is not None:
        return "Not measured: a student's own chat template decides; `xtoken align` counts the chunks."
    if not rows:
        return "Not measured; `xtoken share card CAPTURE --students NAME` counts it for any tokenizer."
    head = ["student's tokenizer", "samples", "chunks of 1 token each", "bytes per chunk", "bytes per student token"]
    return "A chunk is a span that both tokenizations cut at the same bytes.\n\n" + table(head, rows)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.2f}" if whole else "-"


def limits(manifest: CaptureManifest, skipped: Mapping[str, int], *, has_text: bool) -> str:
    """What is not in the capture.

    Args:
        manifest: of it.
        skipped: how many conversations were left out, by reason.
        has_text: whether samples have their text.
    """
    left = set(manifest.left_out)
    lines = ["Each sample was scored on its own: no context crosses from one window of a document to the next."]
    if manifest.chat is not None:
        lines = [
            "Each conversation was scored on its own, as the chat template writes it.",
            *_not_taught(manifest, skipped),
        ]
    if without_rows(manifest.left_out):
        lines.append("The rows' entries were left out: only losses of the text's own log-probabilities can be trained.")
    else:
        lines += open_codec(manifest.codec).limits
    if not has_text:
        lines.append("The text is not included: aligning needs the corpus with the hash above (`--corpus`).")
    if "space_logprob" in left:
        lines.append("`space_logprob` was left out: `alm` runs without its correction for spaces.")
    lines += _missing(manifest)
    lines.append("A teacher's mistakes and biases, and the text's, are in its rows; nothing was filtered.")
    return bullets(lines)


def _not_taught(manifest: CaptureManifest, skipped: Mapping[str, int]) -> list[str]:
    """What conversations have that is not here."""
    figures, lines = chat_figures(manifest), []
    if skipped:
        lines.append(f"Conversations left out: {_by_name(skipped)}; `skipped.jsonl` names them.")
    if "conversations_cut" in figures:
        cut = figures["conversations_cut"]
        lines.append(f"Conversations that lost their last messages, since they were too long: {cut:,}.")
    if "answers_cut" in figures:
        lines.append(f"Answers that were cut at the most tokens, and have no end: {figures['answers_cut']:,}.")
    if "absent_contents" in figures:
        lines.append(f"What the chat template leaves out, or writes otherwise: {_by_name(figures['absent_contents'])}.")
    if "tokenized_apart" in figures:
        lines.append(
            "Samples of which the whole rendering would be cut into other tokens at the ends of contents: "
            f"{figures['tokenized_apart']:,}."
        )
    return lines


def _by_name(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(most) - _NAMED} more" if len(most) > _NAMED else ""
    return ", ".join(f"{plain(name)}: {count:,}" for name, count in most[:_NAMED]) + more


def _missing(manifest: CaptureManifest) -> list[str]:
    lines = []
    if manifest.set_aside:
        named = ", ".join(str(index) for index in sorted(manifest.set_aside)[:_NAMED])
        more = f" and {len(manifest.set_aside) - _NAMED} more" if len(manifest.set_aside) > _NAMED else ""
        lines.append(f"Shards that failed are missing: {named}{more}; `manifest.json` has their errors.")
    if manifest.corpus.bad:
        bad = ", ".join(f"{plain(reason)}: {count:,}" for reason, count in sorted(manifest.corpus.bad.items())[:_NAMED])
        lines.append(f"Documents skipped or mended: {bad}.")
    if any(origin.where or origin.parts for origin in manifest.derived_from):
        lines.append("This is a subset: the corpus above is the whole one.")
    return lines
