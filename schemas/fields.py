"""What every verb's configuration is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

ARGUMENT: Any = {"argument": True}


def argument(description: str) -> Any:
    """A required positional field."""
    return Field(description=description, json_schema_extra=ARGUMENT)


class Config(BaseModel):
    """What every verb's configuration is: closed, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
