"""Losses, found by name and imported on use. A loss is one file with ``open_loss(setup)`` and one line here."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xtoken.schemas.tables import target_columns

if TYPE_CHECKING:
    from xtoken.trainer.losses.base import Loss, LossSetup


@dataclass(frozen=True)
class Entry:
    """A line of the registry: the loss's module by its full name, and the words of ``xtoken losses`` about it."""

    module: str
    matches: str
    stored: str
    when: str
    source: str


_HERE = "xtoken.trainer.losses"

REGISTRY = {
    "ce": Entry(f"{_HERE}.ce", "the text alone", "nothing", "the baseline to beat", ""),
    "p-kl": Entry(
        f"{_HERE}.pkl",
        "the student through W against the teacher's distribution, the tail as one cell",
        "entries of reached ids, tail mass",
        "numerals do not map one to one",
        "arXiv 2605.21699",
    ),
    "h-kl": Entry(
        f"{_HERE}.hkl",
        "one-to-one pairs token by token, the others as sorted lists",
        "entries of pairs, others sorted",
        "numerals map one to one",
        "arXiv 2605.21699",
    ),
    "gold": Entry(
        f"{_HERE}.gold",
        "tokens of equal bytes by generalised JSD, the others as sorted lists",
        "as h-kl, chunk likelihood",
        "a baseline: strict pairs",
        "GOLD in TRL",
    ),
    "uld": Entry(
        f"{_HERE}.uld",
        "sorted probabilities, whatever the tokens",
        "sorted entries, likelihood",
        "a baseline: knows no tokens",
        "arXiv 2402.12030",
    ),
    "alm": Entry(
        f"{_HERE}.alm",
        "the likelihood of each chunk of text",
        "one number per chunk",
        "any pair, byte students too",
        "arXiv 2503.20083",
    ),
    "byte-prefix": Entry(
        f"{_HERE}.byte_prefix",
        "the student's own tokens against the teacher's distribution cut at byte prefixes, inside chunks too",
        "entries per student token",
        "students that split words",
        "docs/losses.md",
    ),
    "sparse-kl": Entry(
        f"{_HERE}.sparse_kl",
        "the distribution itself, token by token, the tail as one cell",
        "entries, tail mass",
        "one shared tokenizer",
        "docs/losses.md",
    ),
}


def open_loss(name: str, setup: "LossSetup") -> "Loss":
    """Build the loss called ``name`` (checked by the configuration) for one W and one student."""
    module: Any = import_module(REGISTRY[name].module)
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
