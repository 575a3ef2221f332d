"""What an artifact holds, in numbers for people: sums over the commit records of its manifest."""

from collections import Counter
from typing import Any

from schemas.manifest import CaptureManifest, TargetManifest


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
        **student,
        "teacher": f"{manifest.teacher.model} ({manifest.teacher.backend})",
    }


def target_figures(manifest: TargetManifest) -> dict[str, Any]:
    """What a target folder holds, in numbers; every count of the parts is summed."""
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        counts.update(part.counts)
    masses = {name.split("_")[1]: counts.pop(name) for name in list(counts) if name.startswith("mass_")}
    tokens = sum(part.tokens for part in manifest.parts)
    return {
        "samples": sum(part.samples for part in manifest.parts),
        "student_tokens": tokens,
        "bytes_per_token": sum(part.file_bytes for part in manifest.parts) / max(tokens, 1),
        "share_of_1_1_chunks": counts["chunks_1_1"] / max(counts["chunks"], 1),
        "losses": ",".join(manifest.losses),
        **counts,
        "teacher_mass": {name: ppm / 1e6 / max(counts["chunks_with_row"], 1) for name, ppm in masses.items()},
    }
