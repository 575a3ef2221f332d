"""What every verb's configuration is made of."""

import re
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from xtoken.schemas.io.paths import Kind, plain, refuse_unusable

# What a field is, in its json_schema_extra: a path, URL or id of something that is read, or an output.
PLACE: Any = {"place": "read"}
OUT_FOLDER: Any = {"place": "folder"}
OUT_FILE: Any = {"place": "file"}
OUT_PAGE: Any = {"place": "page"}  # HTML
OUT_LOG: Any = {"place": "log"}
ARGUMENT: Any = {"argument": True}
ARGUMENTS: Any = {"argument": True, "many": True}  # several words on the command line


def argument(description: str, place: Any = PLACE) -> Any:
    """A required positional field."""
    return Field(description=description, json_schema_extra=ARGUMENT | place)


def place_of(field: FieldInfo) -> str | None:
    """What is at the path that a field holds: read, folder, file, page or log; None for fields that hold none."""
    extra = field.json_schema_extra
    found = extra.get("place") if isinstance(extra, dict) else None
    return None if found is None else str(found)


class Config(BaseModel):
    """What every verb's configuration is: closed, and never changed. Its paths are plain (``schemas.io.paths``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _said_something(cls, value: Any, info: ValidationInfo) -> Any:
        if place_of(cls.model_fields[str(info.field_name)]) is not None:
            return [plain(item) for item in value] if isinstance(value, list) else _plain(value)
        if isinstance(value, str) and not value.strip():
            raise ValueError("it is empty; is a variable unset? give a value, or leave it out")
        return value

    def refuse_unusable_outputs(self) -> None:
        """Raise XtokenError when an output cannot be made where it is to lie."""
        for name, field in type(self).model_fields.items():
            kind, value = place_of(field), getattr(self, name)
            if kind not in (None, "read") and value:  # what is given is never empty
                refuse_unusable(value, cast(Kind, kind))


def _plain(value: str | None) -> str | None:
    return None if value is None else plain(value)


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
