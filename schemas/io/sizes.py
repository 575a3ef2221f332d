"""Sizes in bytes as people write them: ``20GB``, ``512MiB``, ``1000000``."""

import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)
_MEMORY = re.compile(r"\d+(\.\d+)?[KMGT]i?B")  # of what ``parse_size`` reads, that which DuckDB reads alike


def parse_size(text: str) -> int:
    """Bytes of a size; ``K``, ``M``, ``G`` and ``T`` are powers of 1000, with an ``i`` behind them of 1024.

    Raises:
        ValueError: it is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or 20GB, 512MiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def memory_size(value: str) -> str:
    """Check a size of memory that DuckDB is given too; for ``field_validator``.

    Raises:
        ValueError: DuckDB would not read it.
    """
    if _MEMORY.fullmatch(value) is None:
        raise ValueError(f"{value!r} is not a size; write it like 512MB or 2GB")
    return value
