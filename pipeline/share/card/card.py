"""The dataset card of a capture: README.md as the Hugging Face hub reads it, and plots, from the capture alone.

The same capture, licences and flags give the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from xtoken.pipeline.share.card import sections as sections
from xtoken.pipeline.share.card.alignment import Alignment, alignments
from xtoken.pipeline.share.card.markup import code, latex, license_fields, one_line, plain, public
from xtoken.pipeline.share.card.plots import BYTES, PLOTS, draw_plots
from xtoken.pipeline.share.card.stats import read_stats
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.row_stats import RowStats
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.inspect import bytes_per_token
from xtoken.pipeline.store.left_out import without_rows
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_parquet
from xtoken.pipeline.store.seal import SUMS_FILE, seal
from xtoken.pipeline.store.skip_records import SKIPPED_FILE, count_reasons
from xtoken.schemas.configs.share import LICENSED, CardConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import MANIFEST, CaptureManifest, content_hash, part_name, read_manifest
from xtoken.schemas.tables import stored_as
from xtoken.schemas.ui.progress import Progress, Silent

README = "README.md"
_CODE_NOTE = " Tokens stand by the `code` that `vocab.parquet` gives them, which compresses better than their ids."
_TEXT_ROWS = """A row says how the teacher saw the token at position `first_row` plus its own number:
where `first_row` is 1, the sample's first token has no row."""
_CHAT_ROWS = """A row says how the teacher saw one token that is taught: the tokens of spans where `span_learn` is true
have rows, in order. `span_token_end` is where each span ends."""
# Of the recipes: what says which token a row is about, in DuckDB and NumPy; what a sample's surprise is divided by.
_TEXT_RECIPE = {
    "rows_sql": "first_row", "at_sql": "first_row + row", "at_numpy": 'sample["first_row"] + row', "rows_numpy": "",
    "per": "byte", "per_sql": "teacher_end[-1]", "per_polars": 'pl.col("teacher_end").list.last()',
}  # fmt: skip
_CHAT_RECIPE = {
    "rows_sql": "flatten(list_transform(list_zip(list_prepend(0, span_token_end), span_token_end, span_learn),\n"
    "               lambda span: CASE WHEN span[3] THEN range(span[1], span[2]) ELSE [] END)) AS taught",
    "at_sql": "taught[row + 1]",
    "rows_numpy": 'sizes = np.diff(sample["span_token_end"], prepend=0)\n'
    'taught = np.flatnonzero(np.repeat(sample["span_learn"], sizes))  # the token of each row\n',
    "at_numpy": "taught[row]",
    "per": "taught token", "per_sql": "len(realised_logprob)", "per_polars": 'pl.col("realised_logprob").list.len()',
}  # fmt: skip
_TAGS = ("distillation", "knowledge-distillation", "logits", "xtoken")
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
_SIZES_ABOVE = ("10B<n<100B", "100B<n<1T", "n>1T")
_ALT = {name: name.removeprefix("plots/").removesuffix(".png").replace("-", " ") for name in PLOTS}


def write_card(config: CardConfig, progress: Progress) -> dict[str, Any]:
    """Write README.md and plots into a capture's folder, its licences into its manifest, and seal it anew.

    Returns:
        Figures: what was written.

    Raises:
        XtokenError: no capture, no licences in flags or manifest, or students without text.
        VerificationError: a part is damaged.
    """
    root = config.capture
    manifest = read_manifest(root, CaptureManifest)
    licenses = given_licenses(config.license) or manifest.licenses
    check_licenses(root, licenses)
    progress.start("card", sum(part.file_bytes for part in manifest.parts), "bytes")
    try:
        files = card_files(root, manifest, licenses, config.title, config.students, progress)
    finally:
        progress.finish()
    folder = Folder(root)
    folder.remove(SUMS_FILE)  # a run killed from here on leaves no sums rather than wrong ones
    if licenses != manifest.licenses:
        # the version stays: it says how the parts are to be read
        licensed = manifest.model_copy(update={"licenses": licenses})
        folder.replace(MANIFEST, licensed.model_dump_json(indent=1).encode() + b"\n")
    _write(folder, files)
    seal(root)
    plots = len(files) - 1
    without = "none: matplotlib is not installed (pip install 'xtoken[plots]')"
    return {"card": folder.url(README), "license": dict(licenses), "plots": plots or without}


def _write(folder: Folder, files: dict[str, bytes]) -> None:
    folder.make("plots")
    for name, content in files.items():
        folder.replace(name, content)
    for name in set(PLOTS) - set(files):
        folder.remove(name)  # of an earlier card


def given_licenses(flags: Sequence[str]) -> dict[str, str]:
    """``corpus=ID``, ``outputs=ID`` as a dict in that order; empty without flags."""
    found = {name: value.strip() for name, _, value in (flag.partition("=") for flag in flags)}
    return {name: found[name] for name in LICENSED if name in found}


def check_licenses(root: str, licenses: dict[str, str]) -> None:
    """Refuse a card without both licences.

    Raises:
        XtokenError: one is missing.
    """
    missing = [name for name in LICENSED if not licenses.get(name, "").strip()]
    if missing:
        raise XtokenError(
            f"{root} has no licence of its {' and '.join(missing)}; others cannot use it without: name the text's and "
            "the teacher's terms, as in --license corpus=cc-by-4.0,outputs=gemma"
        )


def card_files(
    root: str,
    manifest: CaptureManifest,
    licenses: dict[str, str],
    title: str | None,
    students: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, bytes]:
    """The card's files by relative name: README.md, and of ``PLOTS`` those that there are numbers for.

    The capture is read once, in memory that does not grow with it.

    Args:
        root: folder or URL of the capture.
        manifest: its manifest.
        licenses: of ``corpus`` and ``outputs``.
        title: of the page; the teacher's and the corpus's names when left out.
        students: tokenizers whose alignment is counted (names, folders, or ``bytes``).
        progress: told bytes of the parts read; the caller starts and finishes it.

    Raises:
        XtokenError: a licence is missing, a student's tokenizer cannot be loaded, or students without text.
        VerificationError: a part is damaged.
    """
    check_licenses(root, licenses)
    aligned = alignments(root, manifest, students)
    stats = read_stats(root, manifest, progress or Silent())
    there = sections.schema(manifest).names
    sizes = {name: size for name, size in bytes_per_token(root, manifest).items() if name in there}
    plots = draw_plots(sizes, stats, open_codec(manifest.codec).plot_label)
    fields = _fields(root, manifest, licenses, title, stats, sizes, aligned, list(plots))
    return {README: Template(_read("template.md")).substitute(fields).encode(), **plots}


def _fields(
    root: str,
    manifest: CaptureManifest,
    licenses: dict[str, str],
    title: str | None,
    stats: RowStats,
    sizes: dict[str, float],
    aligned: Sequence[Alignment],
    plots: Sequence[str],
) -> dict[str, str]:
    teacher, source = public(manifest.teacher.model), public(manifest.corpus.source)
    named = title or f"Rows of {one_line(teacher)} over {one_line(source)}"
    has_text = _has_text(root, manifest)
    digest = content_hash(manifest)
    return {
        "front_matter": _front_matter(manifest, licenses, named),
        "title": plain(title) if title else f"Rows of {code(teacher)} over {code(source)}",
        "what": _what(manifest),
        "rows_of": _CHAT_ROWS if manifest.chat is not None else _TEXT_ROWS,
        "facts": sections.facts(manifest),
        "license": _license(manifest, licenses),
        "counts": sections.counts(manifest),
        "columns": sections.columns(manifest, sizes),
        "plot_bytes": _images(name for name in plots if name == BYTES),
        "plots": _images(name for name in plots if name != BYTES),
        "fidelity": sections.fidelity(manifest, stats),
        "alignment": sections.alignment(manifest, aligned),
        "reading": _reading(manifest),
        "loss": "alm" if without_rows(manifest.left_out) else "p-kl",
        "corpus_flag": "" if has_text else " --corpus CORPUS",
        "limits": sections.limits(manifest, count_reasons(Folder(root), SKIPPED_FILE), has_text=has_text),
        "bibtex_title": latex(named),
        "content_hash": digest,
        "short_hash": digest[:12],
    }


def _what(manifest: CaptureManifest) -> str:
    where = "every token of a text" if manifest.chat is None else "every taught token of conversations"
    held = "log-probabilities of the text" if without_rows(manifest.left_out) else "distributions"
    return f"{where}: its {held}"


def _images(names: Any) -> str:
    return "\n".join(f"![{_ALT[name]}]({name})" for name in names)


def _front_matter(manifest: CaptureManifest, licenses: dict[str, str], named: str) -> str:
    """The hub's metadata as YAML."""
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        pretty_name=one_line(named),
        task_categories=["text-generation"],
        size_categories=[size_category(sum(part.samples for part in manifest.parts))],
        tags=list(_TAGS),
        configs=[_config("default", "data/*.parquet"), _config("vocab", "vocab.parquet")],
        **license_fields(licenses),
    )
    return data.to_yaml()


def _config(name: str, path: str) -> dict[str, Any]:
    return {"config_name": name, "data_files": [{"split": "train", "path": path}]}


def size_category(samples: int) -> str:
    """The hub's size category of a number of samples."""
    power = max(0, len(str(samples)) - 3)
    return (*_SIZES, *_SIZES_ABOVE)[min(power, len(_SIZES) + len(_SIZES_ABOVE) - 1)]


def _license(manifest: CaptureManifest, licenses: dict[str, str]) -> str:
    return (
        f"* Text of the corpus: {code(licenses['corpus'])}\n"
        f"* Teacher's outputs, that is its rows: {code(licenses['outputs'])}\n\n"
        f"Both apply. What may be done with the outputs of {code(public(manifest.teacher.model))}, training other "
        "models on them included, is governed by the teacher's own terms: read them before you use this dataset."
    )


def _reading(manifest: CaptureManifest) -> str:
    codec = open_codec(manifest.codec)
    first = min((part.index for part in manifest.parts), default=0)
    values = dict(_TEXT_RECIPE if manifest.chat is None else _CHAT_RECIPE)
    values |= {name: repr(value) for name, value in manifest.codec} | {"part": part_name(first), "sql": "", "numpy": ""}
    by_code = manifest.has_codes
    values["ids"] = next((stored_as(name) if by_code else name for name in codec.id_columns), "")
    values["key"], values["code_note"] = ("code", _CODE_NOTE) if by_code else ("token_id", "")
    if not without_rows(manifest.left_out):
        sql, numpy = Template(codec.recipe).substitute(values).split("\n===\n")
        values |= {"sql": sql.strip(), "numpy": numpy.strip()}
    values |= {"named": f"bits_per_{values['per'].rpartition(' ')[2]}"}
    return Template(_read("reading_any.md")).substitute(values).strip()


def _has_text(root: str, manifest: CaptureManifest) -> bool:
    """Whether the first sample has its text, as all of a capture have or none."""
    if "text" in manifest.left_out or not manifest.parts:
        return False
    url = Folder(root).url(data_name(manifest.parts[0].index))
    return any(batch["text"].null_count < batch.num_rows for batch in iter_parquet(url, ["text"]))


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
