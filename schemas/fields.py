"""What every verb's configuration is made of."""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

ARGUMENT: Any = {"argument": True}
ARGUMENTS: Any = {"argument": True, "many": True}  # several words on the command line


def argument(description: str) -> Any:
    """A required positional field."""
    return Field(description=description, json_schema_extra=ARGUMENT)


class Config(BaseModel):
    """What every verb's configuration is: closed, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def ray_address(value: str | None) -> str | None:
    """Check a value of ``--ray``; for ``field_validator``."""
    if value is not None and value.startswith("ray://"):
        raise ValueError(
            f"{value!r} is a client connection, which a run of days must not hang on; "
            "submit the command to the cluster with 'ray job submit' and say --ray auto"
        )
    if value is not None and value not in ("local", "auto") and re.fullmatch(r"[^/:\s]+:\d+", value) is None:
        raise ValueError(f"{value!r} is no address; say local, auto or HOST:PORT")
    return value


def memory_size(value: str) -> str:
    """Check a size of memory; for ``field_validator``."""
    if re.fullmatch(r"\d+(\.\d+)?[KMGT]i?B", value) is None:
        raise ValueError(f"{value!r} is no size; write it like 512MB or 2GB")
    return value
