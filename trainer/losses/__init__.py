"""Losses, by the file that the schema names for each (``schemas.losses.LOSSES``), imported on use.

A loss is one file here with ``open_loss(setup)``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xtoken.schemas.losses import LOSSES
from xtoken.schemas.tables import target_columns

if TYPE_CHECKING:
    from xtoken.trainer.losses.base import Loss, LossSetup


def open_loss(name: str, setup: "LossSetup") -> "Loss":
    """Build the loss called ``name`` (checked by the configuration) for one W and one student."""
    module: Any = import_module(f"{__name__}.{LOSSES[name].module}")
    loss: Loss = module.open_loss(setup)
    loss.kinds = setup.options.kinds
    return loss


def loss_rows(whole: bool) -> list[dict[str, Any]]:
    """What people read of every loss, one short line each; ``whole`` adds what it matches and its target columns."""
    rows = []
    for name, schema in LOSSES.items():
        about = schema.about
        row: dict[str, Any] = {
            "loss": name,
            "use_when": about.use_when,
            "needs_stored": about.needs_stored,
            "source": about.source,
        }
        if whole:
            row |= {"matches": about.matches, "columns": [c.name for c in target_columns([name], base=False)]}
        rows.append(row)
    return rows
