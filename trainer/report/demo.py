"""What the demo shows at its end."""

from typing import Any


def demo_figures(page: str, captures: dict[str, Any], runs: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The demo's figures: one row per model on the held-out chapter."""
    train = captures["train"]
    names = ("bits_per_byte", "kl", "top1_agreement")
    before = runs["ce"]["before"]
    rows = [{"model": "teacher", "bits_per_byte": before["teacher_bits_per_byte"]}]
    rows.append({"model": "student before"} | {name: before[name] for name in names})
    for loss, run in runs.items():
        rows.append({"model": f"student after {loss}"} | {name: run["after"][name] for name in names})
    return {
        "tokens_captured": train["tokens"],
        "tokens_per_second": train["tokens"] / train["seconds"],
        "bytes_per_token": train["bytes_per_token"],
        "entries_per_row": train["entries_per_row"],
        "share_of_1_1_chunks": train["align_share_of_1_1_chunks"],
        "training_steps": runs["ce"]["steps"],
        "minutes": seconds / 60,
        "page": page,
        "held_out": rows,
    }
