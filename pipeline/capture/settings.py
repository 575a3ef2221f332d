"""What makes two runs the same run, and the records that keep different ones out of one folder."""

import json
from typing import Any

from pipeline.store import STEP, Folder
from pipeline.teachers.base import shows_bos
from pipeline.tokens import TokenTable
from schemas.config import PrecomputeConfig, RowsConfig
from schemas.errors import XtokenError
from schemas.manifest import MANIFEST, CodecInfo, TeacherInfo, digest
from schemas.tables import SCHEMA_VERSIONS

RUN_FILE = "run.json"
TEACHER_FILE = "teacher.json"
# Names whose presence without run.json means that the folder is somebody else's.
_FOREIGN = (MANIFEST, "data", "commits", "config.json", "w.parquet", "metrics.jsonl")


def codec_info(config: RowsConfig) -> CodecInfo:
    """The codec a run's settings ask for."""
    if config.codec == "sampled":
        return CodecInfo(name="sampled", draws=config.draws, seed=config.seed)
    return CodecInfo(k=config.k, min_p=config.min_p, step=STEP, temperatures=[1.0, *config.temperatures])


def sees_bos(config: PrecomputeConfig, table: TokenTable) -> bool:
    """Whether the teacher is shown BOS before each sample.

    Raises:
        XtokenError: ``--bos always`` for a tokenizer that has none.
    """
    if config.bos == "always" and table.info.bos_id is None:
        raise XtokenError(f"--bos always, but the tokenizer {table.info.name!r} has no BOS; use --bos auto")
    return shows_bos(config, table.info)


def run_settings(config: PrecomputeConfig, table: TokenTable, student: TokenTable | None) -> dict[str, Any]:
    """Settings that must not differ between the runs that fill one folder."""
    return {
        "schema_version": SCHEMA_VERSIONS["capture"],
        "teacher": config.teacher,
        "backend": config.backend,
        "revision": config.revision,
        "dtype": config.dtype,
        "tokenizer_hash": table.info.hash,
        "bos": sees_bos(config, table),
        **_codec_settings(config),
        "temperatures": config.temperatures or None,
        "max_tokens": config.max_tokens,
        "text": config.text,
        "student_hash": student.info.hash if student is not None else None,
    }


def _codec_settings(config: PrecomputeConfig) -> dict[str, Any]:
    """What decides the rows; None is what a run.json from before there were draws says by its silence."""
    if config.codec == "sampled":
        names = {"codec": "sampled", "draws": config.draws, "seed": config.seed}
        return {"k": None, "min_p": None, "step": None, **names}
    return {"k": config.k, "min_p": config.min_p, "step": STEP, "codec": None, "draws": None, "seed": None}


def settle_settings(folder: Folder, settings: dict[str, Any]) -> bool:
    """Record the settings in a fresh folder; in a used one they must be the same.

    Returns:
        Whether the folder was fresh.

    Raises:
        XtokenError: the folder belongs to another run; the message names what differs.
    """
    known = {name for name in folder.names() if name in _FOREIGN}
    if known and not folder.exists(RUN_FILE):
        raise XtokenError(f"{folder.root} holds {sorted(known)[0]!r} but no capture; use another --out")
    folder.make("")
    return _settle(folder, RUN_FILE, settings)


def settle_teacher(folder: Folder, info: TeacherInfo) -> None:
    """Record the teacher that was opened; every later one must be the same.

    Raises:
        XtokenError: another teacher, engine or device than the run began with.
    """
    _settle(folder, TEACHER_FILE, info.model_dump())


def read_teacher(folder: Folder) -> TeacherInfo:
    """The teacher that the workers recorded."""
    return TeacherInfo.model_validate_json(folder.read(TEACHER_FILE))


def run_hash(plan_hash: str, teacher: TeacherInfo, settings: dict[str, Any], codec: CodecInfo) -> str:
    """Identity of a run: plan, teacher, tokenizer, codec and options."""
    options = {name: settings[name] for name in ("tokenizer_hash", "bos", "max_tokens", "text")}
    return digest([plan_hash, teacher.model_dump(), options, codec.model_dump()])


def another_run(folder: Folder, differ: list[str]) -> XtokenError:
    """The error that names what two runs differ in."""
    return XtokenError(
        f"{folder.root} holds another run ({'; '.join(differ)}); repeat its settings or use another --out"
    )


def _settle(folder: Folder, name: str, now: dict[str, Any]) -> bool:
    if folder.create(name, json.dumps(now, indent=1).encode() + b"\n"):
        return True
    try:
        there = json.loads(folder.read(name))
    except ValueError as error:
        raise XtokenError(f"{folder.url(name)} is damaged; remove the folder and capture again") from error
    keys = sorted(set(there) | set(now))
    differ = [
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in keys if there.get(key) != now.get(key)
    ]
    if differ:
        raise another_run(folder, differ)
    return False
