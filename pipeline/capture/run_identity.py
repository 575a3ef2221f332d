"""What makes two runs the same run, and the records that keep different ones out of one folder."""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter

from xtoken.pipeline.store.codecs import open_codec, record_of
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.teachers import BACKENDS, sees_whole_rows
from xtoken.pipeline.teachers.base import shows_bos
from xtoken.pipeline.teachers.weights import content_hash, looks, weight_files
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.capture import CodecGroup, PrecomputeConfig, TeacherGroup
from xtoken.schemas.configs.identity import Difference, defaults, differences, identity
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.io.remote import open_url
from xtoken.schemas.manifest import MANIFEST, CodecInfo, EngineSettings, TeacherInfo, digest
from xtoken.schemas.tables import PARTS_SINCE

RUN_FILE = "run.json"
# Fields whose meaning each run.json holds, some in another form; what came later is there by its own name.
_RECORDED = (
    *("teacher", "backend", "revision", "dtype", "bos", "codec", "k", "min_p", "draws", "seed", "temperatures"),
    *("max_tokens", "text"),
)
_DERIVED = ("schema_version", "tokenizer_hash", "step", "student_hash")
_NOTHING: Mapping[str, Any] = {}
TEACHER_FILE = "teacher.json"
WEIGHTS_FILE = "weights.json"
# Of a codec's identity, those that each run.json has, in this order.
_CODEC_NAMES = ("k", "min_p", "step", "codec", "draws", "seed")
_ENGINE = "engine_settings"  # stands in teacher.json beside the fields of TeacherInfo
_TEACHER_BYTES = 4 << 20
# Workers record the teacher, and where all is committed none starts.
_TEACHER_ANEW = (
    "put a copy of it there, or remove it with commits/part-00000.json and data/part-00000.parquet and run the same "
    "command again, which makes these anew"
)
_SETTINGS: TypeAdapter[EngineSettings] = TypeAdapter(EngineSettings)
# Names whose presence without run.json means that the folder is somebody else's.
_FOREIGN = (MANIFEST, "data", "commits", "config.json", "w.parquet", "metrics.jsonl")


def codec_info(codec: CodecGroup) -> CodecInfo:
    """The codec a run's settings ask for."""
    return record_of(codec.codec, codec.settings)


def sees_bos(config: TeacherGroup, table: TokenTable) -> bool:
    """Whether the teacher is shown BOS before each sample.

    Raises:
        XtokenError: ``--bos always`` for a tokenizer that has none.
    """
    if config.bos == "always" and table.info.bos_id is None:
        raise XtokenError(f"--bos always, but the tokenizer {table.info.name!r} has no BOS; use --bos auto")
    return shows_bos(config, table.info)


def run_settings(
    config: PrecomputeConfig, table: TokenTable, student: TokenTable | None, chat: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Settings that must not differ between the runs that fill one folder.

    Args:
        config: of the run.
        table: the teacher's tokens.
        student: the tokens of an intended student.
        chat: what else decides samples of conversations; None of text.
    """
    teacher, codec = config.teacher, config.codec
    settings = {
        # of the parts: what a later version adds to the manifest is no reason to begin anew
        "schema_version": PARTS_SINCE,
        "teacher": teacher.teacher,
        "backend": teacher.backend,
        "revision": teacher.revision,
        "dtype": teacher.dtype,
        "tokenizer_hash": table.info.hash,
        "bos": sees_bos(teacher, table) if chat is None else False,
        **_codec_settings(codec),
        "temperatures": codec.temperatures or None,
        "max_tokens": codec.max_tokens,
        "text": codec.text,
        "student_hash": student.info.hash if student is not None else None,
        **(chat or {}),
    }
    # a field that came later stands there where it says something: what older releases wrote is written as ever
    absent = defaults(type(config), _RECORDED)
    later = {name: value for name, value in identity(config).items() if name not in _RECORDED}
    return settings | {name: value for name, value in later.items() if value != absent.get(name)}


def _codec_settings(codec: CodecGroup) -> dict[str, Any]:
    """What decides the rows; None is what a run.json that does not have the name says by its silence."""
    return {**dict.fromkeys(_CODEC_NAMES), **open_codec(codec_info(codec)).identity}


def settle_settings(folder: Folder, settings: dict[str, Any], model: type[PrecomputeConfig] = PrecomputeConfig) -> bool:
    """Record the settings in a fresh folder; in a used one they must be the same.

    Args:
        folder: the run's.
        settings: of this run, see ``run_settings``.
        model: the configuration whose defaults an older record means by its silence.

    Returns:
        Whether the folder was fresh.

    Raises:
        XtokenError: the folder belongs to another run; the message names what differs.
    """
    _refuse_foreign(folder)
    folder.make("")
    return _settle(folder, RUN_FILE, settings, absent=defaults(model, _RECORDED))


def check_settings(folder: Folder, settings: dict[str, Any], model: type[PrecomputeConfig] = PrecomputeConfig) -> None:
    """Compare the settings with those of the folder, if it has any; nothing is written.

    Raises:
        XtokenError: as ``settle_settings``.
    """
    _refuse_foreign(folder)
    if folder.exists(RUN_FILE):
        differ = _compared(folder, RUN_FILE, settings, _needs(folder, RUN_FILE), (), defaults(model, _RECORDED))
        if differ:
            raise another_run(folder, [str(one) for one in differ])


def settle_weights(folder: Folder, config: TeacherGroup) -> str | None:
    """sha256 of the weights in the teacher's folder; None of a hub model, or of a backend that reads none.

    It is kept in the run's folder with the names, sizes and times of the files it is of, and computed again where these
    are others, as those of a copy on another machine may be.
    """
    files = weight_files(config.teacher) if BACKENDS[config.backend].weights else []
    if not files:
        return None
    now = looks(files)
    with suppress(ValueError, FileNotFoundError, VerificationError):  # a damaged record is worth nothing
        there = json.loads(read_small(folder, WEIGHTS_FILE, _TEACHER_BYTES))
        if isinstance(there, dict) and there.get("files") == now and isinstance(there.get("sha256"), str):
            return str(there["sha256"])
    found = content_hash(files)
    folder.replace(WEIGHTS_FILE, json.dumps({"files": now, "sha256": found}, indent=1).encode() + b"\n")
    return found


def settle_teacher(folder: Folder, info: TeacherInfo, settings: Mapping[str, Any] | None = None) -> TeacherInfo:
    """Record the teacher that was opened; every later one must be the same, on whatever device.

    Args:
        folder: the run's.
        info: of the engine; decides what the same is, but for the device and how many of them, which move no row by
            more than rounding, and for the way rows leave the engine: all ways give the same rows, and one worker that
            falls back must not end a run. Parts name theirs. But a way that gives less than the run began with is
            refused: parts must carry the same columns.
        settings: what the engine was started with. The first engine's are recorded; others may differ, as batches and
            memory do from machine to machine.

    Returns:
        The teacher that the run began with.

    Raises:
        XtokenError: another teacher or engine than the run began with.
    """
    record = {**info.model_dump(), _ENGINE: _SETTINGS.validate_python(dict(settings or {}))}
    _settle(folder, TEACHER_FILE, record, free=(_ENGINE, "capture_path", "device", "tensor_parallel"))
    first = read_teacher(folder)
    if sees_whole_rows(first) and not sees_whole_rows(info):
        raise XtokenError(
            f"{folder.root} holds parts with P(a word begins) of each row, taken by {first.capture_path}, and this "
            f"worker's engine gives the top k only ({info.capture_path}; its log says why): mend it, or leave the run "
            "to other workers"
        )
    return first


def read_teacher(folder: Folder) -> TeacherInfo:
    """The teacher that the workers recorded.

    Raises:
        VerificationError: the record is damaged.
    """
    return _read_teacher(folder)[0]


def read_engine_settings(folder: Folder) -> EngineSettings:
    """What the first engine was started with; empty where an older release recorded the teacher.

    Raises:
        VerificationError: the record is damaged.
    """
    return _read_teacher(folder)[1]


def as_begun(config: PrecomputeConfig, folder: Folder) -> PrecomputeConfig:
    """With the tokens per call that the run's first engine took, where --batch-tokens is left out."""
    if config.teacher.batch_tokens is not None or not folder.exists(TEACHER_FILE):
        return config
    settings = read_engine_settings(folder)
    took = settings.get("batch_tokens") or settings.get("max_num_batched_tokens")
    teacher = config.teacher.model_copy(update={"batch_tokens": int(took)}) if took else config.teacher
    return config.model_copy(update={"teacher": teacher})


def _read_teacher(folder: Folder) -> tuple[TeacherInfo, EngineSettings]:
    try:
        record = json.loads(read_small(folder, TEACHER_FILE, _TEACHER_BYTES))
        settings = _SETTINGS.validate_python(record.pop(_ENGINE, {}))
        return TeacherInfo.model_validate(record), settings
    except FileNotFoundError as error:
        raise VerificationError(f"{folder.url(TEACHER_FILE)} is missing; {_TEACHER_ANEW}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise VerificationError(f"{folder.url(TEACHER_FILE)} is damaged ({said}); {_TEACHER_ANEW}") from error


def read_small(folder: Folder, name: str, limit: int) -> bytes:
    """Content of a file of at most ``limit`` bytes; FileNotFoundError when absent.

    Raises:
        VerificationError: it is longer, or a symbolic link.
    """
    url = folder.url(name)
    if folder.is_link(name):
        raise VerificationError(f"{url} is a symbolic link; an artifact holds plain files only")
    with open_url(url) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise VerificationError(f"{url} has more than the {limit} bytes that are read; something else wrote it")
    return data


def read_record(folder: Folder, name: str, *, needed: bool) -> dict[str, Any]:
    """A record that a run wrote as it began.

    Args:
        folder: the run's.
        name: of the record.
        needed: whether the run cannot go on where it is removed.

    Raises:
        VerificationError: it is no JSON object, or one that says nothing.
    """
    try:
        found = json.loads(folder.read(name))
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and found:
        return found
    mend = (
        "put a copy of it there (the same command with another --out writes the same one as it starts)"
        if needed
        else "remove it"
    )
    raise VerificationError(
        f"{folder.url(name)} is damaged: it holds no settings; {mend} and run the same command again"
    )


def run_hash(plan_hash: str, teacher: TeacherInfo, settings: dict[str, Any], codec: CodecInfo) -> str:
    """Identity of a run: plan, teacher, tokenizer, codec and options."""
    options = {name: settings[name] for name in ("tokenizer_hash", "bos", "max_tokens", "text")}
    options |= {name: value for name, value in settings.items() if name not in (*_RECORDED, *_DERIVED)}
    return digest([plan_hash, teacher.model_dump(), options, codec.model_dump()])


def another_run(folder: Folder, differ: list[str]) -> XtokenError:
    """The error that names what two runs differ in."""
    return XtokenError(
        f"{folder.root} holds another run ({'; '.join(differ)}); repeat its settings or use another --out"
    )


def create_or_compare(
    folder: Folder,
    name: str,
    now: Mapping[str, Any],
    *,
    needed: bool,
    free: Collection[str] = (),
    absent: Mapping[str, Any] = _NOTHING,
) -> list[Difference] | None:
    """Write a record of whose run a folder is, or compare with the one that is there.

    Args:
        folder: the run's.
        name: of the record.
        now: what it says of this run.
        needed: see ``read_record``.
        free: names that may differ.
        absent: what a record means that lacks a name.

    Returns:
        What differs; None when the record was written. What only the record has is of a later release, and differs.

    Raises:
        VerificationError: the record that is there is damaged.
    """
    if folder.create(name, json.dumps(now, indent=1).encode() + b"\n"):
        return None
    return _compared(folder, name, now, needed, free, absent)


def _compared(
    folder: Folder, name: str, now: Mapping[str, Any], needed: bool, free: Collection[str], absent: Mapping[str, Any]
) -> list[Difference]:
    there = read_record(folder, name, needed=needed)
    names = sorted({*there, *now}.difference(free))
    return differences(there, {name: now.get(name, absent.get(name)) for name in names}, absent)


def _settle(
    folder: Folder, name: str, now: dict[str, Any], free: tuple[str, ...] = (), absent: Mapping[str, Any] = _NOTHING
) -> bool:
    """Write a record, or compare with the one that is there; whether it was written."""
    needed = _needs(folder, name)
    differ = create_or_compare(folder, name, now, needed=needed, free=free, absent=absent)
    if differ:
        raise another_run(folder, [str(one) for one in differ])
    return differ is None


def _needs(folder: Folder, name: str) -> bool:
    """Whether a record is: without run.json, what lies there would be somebody else's; others are made again."""
    return name == RUN_FILE and any(one in _FOREIGN for one in folder.names())


def _refuse_foreign(folder: Folder) -> None:
    known = {name for name in folder.names() if name in _FOREIGN}
    if known and not folder.exists(RUN_FILE):
        raise XtokenError(f"{folder.root} holds {sorted(known)[0]!r} but no capture; use another --out")
