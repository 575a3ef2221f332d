"""What the verb align does: one capture, or several, which get a folder of targets each; and what it took in figures.

``xtoken train T/a,T/b`` joins such folders sample by sample.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xtoken.pipeline.align.common_samples import MOST_CAPTURES, compare, refuse_nothing_in_common
from xtoken.pipeline.align.refusals import refuse_losses, refuse_narrow_student
from xtoken.pipeline.align.run import align, written
from xtoken.pipeline.align.run_identity import RUN_FILE
from xtoken.pipeline.capture.multi_teacher import names_below
from xtoken.pipeline.executors.local import refuse_unshared
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.figures import target_figures
from xtoken.pipeline.store.files import DiskFull, Folder
from xtoken.pipeline.store.reader import iter_parquet
from xtoken.pipeline.store.skip_records import SKIPPED_FILE, count_reasons
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import IncompleteRun, PartlyDone, XtokenError
from xtoken.schemas.io.overlap import refuse_inside
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, content_hash, part_name, read_manifest
from xtoken.schemas.missing_mass import lacking_columns, lacking_note
from xtoken.schemas.ui.progress import Progress

_LOG = logging.getLogger("xtoken")
JOIN_FILE = "join.json"
# Of a capture's figures, those that a table of captures shows, and those it shows where they are not 0.
_COLUMNS = ("samples", "student_tokens", "seconds")
_BAD = ("samples_skipped", "skipped", "set_aside")


@dataclass(frozen=True)
class _Outcome:
    """What became of one capture: figures of its targets where they are finished, and the error that ended its run."""

    config: AlignConfig
    figures: dict[str, Any]
    error: XtokenError | None = None


def run_captures(config: AlignConfig, progress: Progress) -> dict[str, Any]:
    """Align one capture, or several below ``--out``.

    Args:
        config: of one or several captures.
        progress: told samples compared, then each capture's tokens.

    Returns:
        Figures of the targets; of several, a row for each, and what they have in common.

    Raises:
        PartlyDone: one of several captures failed, or parts were quarantined; the other targets stand.
        XtokenError: as ``align``; or several captures have nothing in common, or cannot be told apart.
    """
    if not config.captures:
        raise XtokenError("no capture named; 'xtoken precompute' writes one")
    if config.corpus is not None:
        refuse_inside("--out", config.out, config.corpus)
    if len(config.captures) == 1:
        outcome = _outcome(config, progress)
        if outcome.error is None:
            return outcome.figures
        if not outcome.figures:
            raise outcome.error
        raise PartlyDone(str(outcome.error), outcome.figures, outcome.error.exit_code) from outcome.error
    return _run_several(config, progress)


def _run_several(config: AlignConfig, progress: Progress) -> dict[str, Any]:
    configs = each_below(config)
    captures = _captures(configs)
    join = compare(captures, config.memory_limit, progress)
    refuse_nothing_in_common(captures, join)
    _write_join(config.out, captures, join)
    outcomes: list[_Outcome] = []
    for one in configs:
        outcomes.append(_outcome(one, progress))
        if isinstance(outcomes[-1].error, DiskFull):  # the next one would find no room either
            break
    figures = {"captures": [_row(outcome, join) for outcome in outcomes], "join": _shown(join), "out": config.out}
    if any(outcome.error is not None for outcome in outcomes):
        asked = [(outcome.config.captures[0], outcome.error) for outcome in outcomes]
        raise PartlyDone.of_several(asked, "captures are not done, the others' targets stand", figures)
    return figures


def each_below(config: AlignConfig) -> list[AlignConfig]:
    """A run for each capture, with a folder below ``--out`` that is named like it.

    Raises:
        XtokenError: two would have the same name, there are too many, ``--w`` is given, or ``--out`` is that of one
            capture.
    """
    if config.w is not None:
        raise XtokenError(
            f"--w {config.w} is of one teacher, and {len(config.captures)} captures are named; leave --w out (each W "
            "is built), or align the captures one by one"
        )
    if len(config.captures) > MOST_CAPTURES:
        raise XtokenError(f"{len(config.captures)} captures are more than the {MOST_CAPTURES} that one run compares")
    names = names_below(config.captures, config.out)
    refuse_unshared(config.out)
    if Folder(config.out).exists(RUN_FILE):
        raise XtokenError(f"{config.out} holds the targets of one capture ({RUN_FILE}); give another --out")
    return [
        config.model_copy(update={"captures": [capture], "out": f"{config.out.rstrip('/')}/{name}"})
        for capture, name in zip(config.captures, names, strict=True)
    ]


def _captures(configs: list[AlignConfig]) -> dict[str, CaptureManifest]:
    """All manifests, none of which the student or a loss refuses."""
    student = load_tokenizer(configs[0].student).table
    refuse_narrow_student(configs[0], student)
    manifests = {config.captures[0]: read_manifest(config.captures[0], CaptureManifest) for config in configs}
    for config in configs:
        refuse_unshared(config.captures[0])
        refuse_losses(config, student.info, manifests[config.captures[0]])
    return manifests


def _write_join(out: str, captures: Mapping[str, CaptureManifest], join: dict[str, Any]) -> None:
    about = {
        root: {
            "content_hash": content_hash(manifest),
            "teacher": manifest.teacher.model,
            "max_tokens": manifest.max_tokens,
            "plan_hash": manifest.plan_hash,
            **join["captures"][root],
        }
        for root, manifest in captures.items()
    }
    folder = Folder(out)
    folder.make("")
    text = json.dumps({**join, "captures": about}, indent=1, ensure_ascii=False)
    folder.replace(JOIN_FILE, text.encode() + b"\n")


def _outcome(config: AlignConfig, progress: Progress) -> _Outcome:
    began, error = time.monotonic(), None
    manifest: TargetManifest | None = None
    try:
        manifest = align(config, progress)
    except IncompleteRun as incomplete:
        error, manifest = incomplete, written(config.out)
    except XtokenError as failed:
        return _Outcome(config, {}, failed)
    figures = {} if manifest is None else _figures(config, manifest, time.monotonic() - began)
    return _Outcome(config, figures, error)


def _figures(config: AlignConfig, manifest: TargetManifest, seconds: float) -> dict[str, Any]:
    figures = target_figures(manifest)
    named: dict[str, Any] = {}
    if figures.get("samples_skipped"):
        named["skipped"] = f"{config.out.rstrip('/')}/{SKIPPED_FILE}"
        named["skipped_by_reason"] = count_reasons(Folder(config.out), SKIPPED_FILE)
    if note := lacking(config.out, manifest):
        _LOG.warning("%s", note)
        named["notes"] = [note]
    return figures | named | {"seconds": round(seconds, 1), "out": config.out}


def lacking(out: str, manifest: TargetManifest) -> str | None:
    """What losses miss of the teacher's rows at this temperature, by the first batch of the targets."""
    asked = {loss: lacking_columns(loss, manifest.tau, manifest.merge) for loss in manifest.losses}
    losses = [loss for loss, names in asked.items() if names]
    filled = [part.index for part in manifest.parts if part.samples]
    if not losses or not filled:
        return None
    columns = asked[losses[0]]
    batch = next(iter_parquet(Folder(out).url(f"data/{part_name(filled[0])}"), columns))
    return lacking_note(out, losses, manifest.tau, {name: flat(batch, name) for name in columns})


def _row(outcome: _Outcome, join: dict[str, Any]) -> dict[str, Any]:
    capture, figures = outcome.config.captures[0], outcome.figures
    said = "done" if outcome.error is None else "partly" if figures else "failed"
    shown = {name: figures[name] for name in (*_COLUMNS, *_BAD) if figures.get(name) or (figures and name in _COLUMNS)}
    common = {name: count for name, count in join["captures"][capture].items() if name != "alike"}
    return {"capture": capture, "outcome": said, **common, **shown, "out": outcome.config.out}


def _shown(join: dict[str, Any]) -> dict[str, Any]:
    """What all captures have in common; each one's counts stand in its row."""
    return {name: value for name, value in join.items() if name != "captures" and value != {}}
