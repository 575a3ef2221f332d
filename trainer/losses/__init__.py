"""Losses, found by name and imported on use. A loss is one file with ``open_loss`` and one line here."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.losses.base import Loss, LossSetup


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
        "per chunk: teacher ids, log-probabilities, REST",
        "numerals or other critical tokens do not map one to one",
        "X-Token, arXiv 2605.21699",
    ),
    "h-kl": Entry(
        "hkl",
        "one-to-one pairs token by token, the others as sorted lists",
        "per chunk: student ids and log-probabilities of pairs, sorted log-probabilities of the others",
        "the critical tokens map one to one",
        "X-Token, arXiv 2605.21699",
    ),
    "gold": Entry(
        "gold",
        "tokens of equal bytes by generalised JSD, the others as sorted lists",
        "per chunk: as h-kl with strict pairs, and the likelihood of the chunk's other tokens",
        "a baseline: strictly one to one",
        "GOLD in TRL (experimental)",
    ),
    "uld": Entry(
        "uld",
        "sorted probabilities, whatever the tokens",
        "per chunk: sorted log-probabilities, and the likelihood of the chunk's other tokens",
        "a baseline: knows no tokens",
        "ULD, arXiv 2402.12030",
    ),
    "alm": Entry(
        "alm",
        "the likelihood of each chunk of text",
        "per chunk: one log-likelihood, and P(next token starts with a space)",
        "any pair, down to a byte-level student; the smallest targets",
        "ALM, arXiv 2503.20083",
    ),
    "byte-prefix": Entry(
        "byte_prefix",
        "the student's own tokens against the teacher's row cut at byte prefixes, inside chunks too",
        "per student token: student ids, log-probabilities, REST, and groups of longer teacher tokens",
        "the student splits many teacher tokens; no W in the loss",
        "this project, docs/losses.md",
    ),
    "sparse-kl": Entry(
        "same_tokenizer",
        "the row itself, token by token, REST as one cell",
        "per token: ids, log-probabilities, REST",
        "teacher and student share a tokenizer",
        "this project, docs/losses.md",
    ),
}


def open_loss(name: str, setup: "LossSetup") -> "Loss":
    """Build the loss called ``name`` (checked by the configuration) for one W and one student."""
    module: Any = import_module(f"trainer.losses.{REGISTRY[name].module}")
    loss: Loss = module.open_loss(setup)
    return loss
