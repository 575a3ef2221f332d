"""Losses, found by name and imported on use. A loss is one file with ``open_loss`` and one line here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.losses.base import Loss, LossSetup

MODULES = {
    "ce": "trainer.losses.ce",
    "p-kl": "trainer.losses.pkl",
    "h-kl": "trainer.losses.hkl",
}


def open_loss(name: str, setup: "LossSetup") -> "Loss":
    """Build the loss called ``name`` (checked by the configuration) for one W and one student."""
    module: Any = import_module(MODULES[name])
    loss: Loss = module.open_loss(setup)
    return loss
