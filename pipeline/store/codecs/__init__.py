"""Codecs: how a teacher's distributions become columns and come back. One file each, found by name, imported on use.

``xtoken.schemas.codecs.CODECS`` is the registry; what a codec must say is in ``base``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xtoken.schemas.codecs import CodecSettings, registered

if TYPE_CHECKING:
    from xtoken.pipeline.store.codecs.base import Codec
    from xtoken.schemas.manifest import CodecInfo


def open_codec(info: "CodecInfo") -> "Codec":
    """The codec of a manifest's record."""
    codec: Codec = _kind(info.name)(info)
    return codec


def record_of(name: str, settings: CodecSettings) -> "CodecInfo":
    """The manifest's record of a codec with these settings."""
    info: CodecInfo = _kind(name).record(settings)
    return info


def _kind(name: str) -> Any:
    return import_module(registered(name).module).CODEC
