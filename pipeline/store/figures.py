"""What an artifact holds, in numbers for people: sums over the commit records of its manifest."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xtoken.schemas.errors import last_words
from xtoken.schemas.manifest import (
    AnyManifest,
    AuditRecord,
    CaptureManifest,
    ProjectionManifest,
    TargetManifest,
    TokenizerInfo,
)

_NAMED = 3
# Which of several figures is the worst one.
_WORST = {"same_top1": min, "ids_in_common": min}
_IN_TABLE = ("realised_mean", "realised_max", "entries_mean", "entropy_mean", "same_top1", "ids_in_common", "kl_mean")


def capture_figures(manifest: CaptureManifest) -> dict[str, Any]:
    """What a capture holds, in numbers."""
    tokens = sum(part.tokens for part in manifest.parts)
    file_bytes = sum(part.file_bytes for part in manifest.parts)
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        counts.update(part.counts)
    student = {"share_of_1_1_chunks": counts["chunks_1_1"] / counts["chunks"]} if counts["chunks"] else {}
    return {
        "samples": sum(part.samples for part in manifest.parts),
        "tokens": tokens,
        "rows": sum(part.rows for part in manifest.parts),
        "entries_per_row": sum(part.entries for part in manifest.parts) / max(sum(p.rows for p in manifest.parts), 1),
        "text_bytes": sum(part.text_bytes for part in manifest.parts),
        "bytes_per_token": file_bytes / max(tokens, 1),
        "bad_documents": dict(manifest.corpus.bad),
        "snapped_samples": counts["snapped"],
        **({"ends_moved": counts["ends_moved"]} if counts["snapped"] and "ends_moved" in counts else {}),
        **student,
        **(bos_figure(manifest.tokenizer, shown=manifest.bos) if manifest.chat is None else chat_figures(manifest)),
        **({"audits": audits_line(manifest.audits)} if manifest.audits else {}),
        "teacher": f"{manifest.teacher.model} ({manifest.teacher.backend})",
    }


def chat_figures(manifest: CaptureManifest) -> dict[str, Any]:
    """What a capture of conversations holds, in numbers that follow from the counts of its parts; nothing of text."""
    if manifest.chat is None:
        return {}
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        counts.update(part.counts)
    rows, tokens = (sum(getattr(part, name) for part in manifest.parts) for name in ("rows", "tokens"))
    groups = {"absent_contents": _of_each(counts, "absent_"), "trimmed_contents": _of_each(counts, "trimmed_")}
    single = ("conversations_cut", "answers_cut", "conversations_skipped", "tokenized_apart")
    return {
        "form": manifest.chat.form,
        "conversations": counts["documents"],
        "taught_turns": counts["turns"],
        "taught_tokens": _of_each(counts, "taught_"),
        "share_of_tokens_taught": round(rows / max(tokens, 1), 4),
        **{name: found for name, found in groups.items() if found},
        **{name: counts[name] for name in single if counts[name]},
    }


def chat_summary(manifest: AnyManifest) -> dict[str, Any]:
    """What a capture, or targets, of conversations hold, and how they were read and rendered; nothing of others."""
    if isinstance(manifest, ProjectionManifest) or manifest.chat is None:
        return {}
    if isinstance(manifest, CaptureManifest):
        settings: dict[str, Any] = {name: getattr(manifest.chat, name) for name in ("turns", "long")}
        if manifest.chat.answering is not None:
            settings["answering"] = manifest.chat.answering.model_dump()
        figures = chat_figures(manifest)
    else:
        settings, figures = {}, target_figures(manifest).get("conversations", {})
    chat = manifest.chat
    rendered = {} if chat.template is None else {"template": chat.template, "date": chat.date}
    return {**figures, **settings, "learn": ",".join(chat.learn), **rendered}


def _of_each(counts: Counter[str], prefix: str) -> dict[str, int]:
    found = sorted((name, count) for name, count in counts.items() if count and name.startswith(prefix))
    return {name.removeprefix(prefix): count for name, count in found}


def bos_figure(tokenizer: TokenizerInfo, *, shown: bool) -> dict[str, str]:
    """A word about a teacher that is not shown the BOS its files declare; nothing where it is, or BOS is EOS."""
    if shown or tokenizer.bos_id in (None, tokenizer.eos_id):
        return {}
    why = "left out by --bos never" if tokenizer.adds_bos else "declared, but the tokenizer's post-processor adds none"
    return {
        "bos": f"BOS (id {tokenizer.bos_id}) is {why}: the teacher sees none. If it was trained behind BOS, say --bos "
        "always"
    }


def target_figures(manifest: TargetManifest) -> dict[str, Any]:
    """What a target folder holds, in numbers; every count of the parts is summed."""
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        counts.update(part.counts)
    masses = {name.split("_")[1]: counts.pop(name) for name in list(counts) if name.startswith("mass_")}
    chat = {name.removeprefix("chat_"): counts.pop(name) for name in list(counts) if name.startswith("chat_")}
    tokens = sum(part.tokens for part in manifest.parts)
    aside = {f"part {index}": last_words(why) for index, why in manifest.set_aside.items()}
    return {
        "samples": sum(part.samples for part in manifest.parts),
        "student_tokens": tokens,
        "bytes_per_token": sum(part.file_bytes for part in manifest.parts) / max(tokens, 1),
        "share_of_1_1_chunks": counts["chunks_1_1"] / max(counts["chunks"], 1),
        "losses": ",".join(manifest.losses),
        **counts,
        **({"conversations": _chat_figures(chat)} if chat else {}),
        "teacher_mass": {name: ppm / 1e6 / max(counts["chunks_with_row"], 1) for name, ppm in masses.items()},
        **({"set_aside": aside} if aside else {}),
    }


def _chat_figures(counts: Mapping[str, int]) -> dict[str, Any]:
    """Of conversations: what is taught, how much of it has chunks, and what the two renderings do not share."""
    share = counts["chunk_bytes"] / max(counts["taught_bytes"], 1)
    shown = {name: counts[name] for name in ("learn_tokens", "ce_only_tokens") if name in counts}
    others = {name: count for name, count in counts.items() if name.startswith(("lost_", "alone_"))}
    return {"share_of_taught_bytes": share, **shown, **others, "tokens_differ": counts.get("tokens_differ", 0)}


def worst_figures(audits: Sequence[AuditRecord]) -> dict[str, float]:
    """The worst of each figure over all audits; none without audits."""
    found = {}
    for name in AuditRecord.model_fields:
        values = [value for audit in audits if isinstance(value := getattr(audit, name), float)]
        if values:
            found[name] = _shown(name, _WORST.get(name, max)(values))
    return found


def audit_rows(audits: Sequence[AuditRecord]) -> list[dict[str, Any]]:
    """One row per audit for a table, the worst log-probabilities of the text's tokens first; means only, and a maximum.

    All figures of each stand in the manifest.
    """
    ordered = sorted(audits, key=lambda audit: -audit.realised_mean)
    return [
        {"scored_by": audit.against, "rows": audit.rows}
        | {name: _shown(name, value) for name in _IN_TABLE if (value := getattr(audit, name)) is not None}
        for audit in ordered
    ]


def _shown(name: str, figure: float) -> float:
    """A difference with two digits, a share with four."""
    return round(figure, 4) if name in _WORST else float(f"{figure:.2g}")


def audits_line(audits: Sequence[AuditRecord], shown: Callable[[object], str] = str) -> str:
    """Audits in one line; ``shown`` writes words that came with the capture."""
    worst, rows = worst_figures(audits), sum(audit.rows for audit in audits)
    ways = ", ".join(shown(way) for way in sorted({audit.against for audit in audits})[:_NAMED])
    top1 = f", the most probable token is the same in {worst['same_top1']:.1%}" if "same_top1" in worst else ""
    return (
        f"{rows:,} rows scored again by {ways}; in the worst of {len(audits):,} audits log-probabilities of the text's "
        f"tokens differ by {worst['realised_mean']:.2g} nats on average, at most by {worst['realised_max']:.2g}{top1}"
    )
