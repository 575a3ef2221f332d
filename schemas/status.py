"""status.json: what a capture's driver writes while it works; see ``pipeline.capture.monitor.dashboard``."""

import re
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from xtoken.schemas.errors import XtokenError

LIVE = ("planning", "running", "sealing")
_CELL = re.compile(r"status(?:-(\d{1,6})-of-(\d{1,6}))?\.json")
_Count = Annotated[int, Field(ge=0)]
_Figure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Written(BaseModel):
    """Written by this version, read by all: what a later one adds is passed over."""

    model_config = ConfigDict(extra="ignore")


class WorkerStatus(_Written):
    """One worker: where it runs, what it does, since when (UTC)."""

    slot: int
    place: str = ""
    shard: int | None = None
    state: str
    tokens_per_s: _Figure | None = Field(None, description="last minute; None until a first shard is committed")
    since: AwareDatetime


class RunStatus(_Written):
    """How one driver's run stands; of a cell, everything is about the cell's shards.

    Rates are in teacher tokens, which are known from committed shards; within a shard they follow from bytes of text.
    """

    xtoken_version: str
    phase: str = Field(description="planning, running, sealing, done, failed, interrupted")
    error: str = ""
    cell: str | None = None
    host: str
    pid: int
    began: AwareDatetime
    updated: AwareDatetime
    seconds: _Figure = Field(description="since the driver began")
    shards: _Count
    shards_done: _Count
    shards_in_flight: _Count = 0
    text_bytes: _Count
    text_bytes_done: _Count
    tokens: _Count = Field(description="committed, by this and earlier runs")
    tokens_per_s: _Figure | None = Field(None, description="last minute")
    tokens_per_s_mean: _Figure | None = Field(None, description="since a first worker was ready")
    seconds_left: _Figure | None = None
    worker_seconds: _Figure = 0.0
    gpu_seconds: _Figure = 0.0
    failures: dict[str, _Count] = {}
    restarts: _Count = 0
    lost_machines: _Count = 0
    outages: _Count = 0
    log_lines_lost: _Count = Field(0, description="events that could not be written to the log")
    last_failure: str = ""
    set_aside: dict[int, str] = Field({}, description="shards that failed three times, the first of them")
    shards_set_aside: _Count = 0
    workers: list[WorkerStatus] = Field([], max_length=100_000)


def suffixed(stem: str, ending: str, cell: str | None) -> str:
    """``status.json``, or ``status-2-of-8.json`` for cell 2/8."""
    return f"{stem}.{ending}" if cell is None else f"{stem}-{cell.replace('/', '-of-')}.{ending}"


def is_status(name: str) -> bool:
    """Whether a file name is of a driver's status."""
    return _CELL.fullmatch(name) is not None


def parse_status(url: str, data: bytes) -> RunStatus:
    """Content of a status file.

    Raises:
        XtokenError: it is none.
    """
    try:
        return RunStatus.model_validate_json(data)
    except ValueError as error:
        raise XtokenError(f"{url} is not a status of a capture; remove it, the next run writes it anew") from error
