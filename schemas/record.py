"""The base of everything that is read from other people's JSON."""

from pydantic import BaseModel, ConfigDict

LONGEST_TEXT = 1 << 20


class Record(BaseModel):
    """Known fields only, finite numbers, texts of at most a MiB."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), str_max_length=LONGEST_TEXT, allow_inf_nan=False)
