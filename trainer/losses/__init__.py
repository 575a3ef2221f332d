"""Losses, found by name and imported on use. A loss is one file with ``open_loss`` and one line here."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xtoken.schemas.tables import target_columns

if TYPE_CHECKING:
    from xtoken.trainer.losses.base import Loss, LossSetup


@dataclass(frozen=True)
class Entry:
    """A line of the registry: the loss's module, and what ``xtoken losses`` says of it."""

    module: str
    matches: str
    stored: str
    when: str
    source: str


REGISTRY = {
    "ce": Entry("ce", "the text alone", "nothing", "the baseline to beat", ""),
    "p-kl": Entry(
        "pkl",
        "the student through W against the teacher's row, REST as one cell",
        "rows of reached ids, REST",
        "numerals do not map one to one",
        "arXiv 2605.21699",
    ),
    "h-kl": Entry(
        "hkl",
        "one-to-one pairs token by token, the others as sorted lists",
        "rows of pairs, sorted rest",
        "numerals map one to one",
        "arXiv 2605.21699",
    ),
    "gold": Entry(
        "gold",
        "tokens of equal bytes by generalised JSD, the others as sorted lists",
        "as h-kl, chunk likelihood",
        "a baseline: strict pairs",
        "GOLD in TRL",
    ),
    "uld": Entry(
        "uld",
        "sorted probabilities, whatever the tokens",
        "sorted rows, likelihood",
        "a baseline: knows no tokens",
        "arXiv 2402.12030",
    ),
    "alm": Entry(
        "alm",
        "the likelihood of each chunk of text",
        "one number per chunk",
        "any pair, byte students too",
        "arXiv 2503.20083",
    ),
    "byte-prefix": Entry(
        "byte_prefix",
        "the student's own tokens against the teacher's row cut at byte prefixes, inside chunks too",
        "rows per student token",
        "students that split words",
        "docs/losses.md",
    ),
    "sparse-kl": Entry(
        "sparse_kl",
        "the row itself, token by token, REST as one cell",
        "rows, REST",
        "one shared tokenizer",
        "docs/losses.md",
    ),
}


def open_loss(name: str, setup: "LossSetup") -> "Loss":
    """Build the loss called ``name`` (checked by the configuration) for one W and one student."""
    module: Any = import_module(f"xtoken.trainer.losses.{REGISTRY[name].module}")
    loss: Loss = module.open_loss(setup)
    return loss


def loss_rows(whole: bool) -> list[dict[str, Any]]:
    """The registry, one short line each; ``whole`` adds what it matches and its target columns."""
    rows = []
    for name, entry in REGISTRY.items():
        row: dict[str, Any] = {
            "loss": name,
            "use_when": entry.when,
            "needs_stored": entry.stored,
            "source": entry.source,
        }
        if whole:
            row |= {"matches": entry.matches, "columns": [c.name for c in target_columns([name], base=False)]}
        rows.append(row)
    return rows
