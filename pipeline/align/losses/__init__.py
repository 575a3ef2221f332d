"""Losses as align builds them, by the file that the schema names, imported on use."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from xtoken.pipeline.align.losses.base import TargetBuilder, TextAlone
from xtoken.schemas.losses import LOSSES


def builder(loss: str) -> TargetBuilder:
    """What builds the target columns of a loss of ``LOSSES``; a loss without columns has no file here."""
    schema = LOSSES[loss]
    if not schema.columns:
        return TextAlone(loss)
    module: Any = import_module(f"{__name__}.{schema.module}")
    made: TargetBuilder = module.Builder(loss)
    return made


def builders(losses: Iterable[str]) -> list[TargetBuilder]:
    """``builder`` of each."""
    return [builder(loss) for loss in losses]
