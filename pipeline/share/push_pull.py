"""push and pull: an artifact, or a true subset of one, from any folder or URL to any other."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from xtoken.pipeline.share.card.card import card_files, given_licenses
from xtoken.pipeline.share.destination import reachable
from xtoken.pipeline.share.shipment import PartJob, Rewrite, Shipment, SideFile
from xtoken.pipeline.share.subset import capture_rewrite, chosen_parts, is_subset, refuse_subset, subset_manifest
from xtoken.pipeline.share.transfer import transfer
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.seal import (
    CARD_FILE,
    OPTIONAL_FILES,
    PLAN_FILE,
    PLOT_FOLDER,
    PLOTS,
    SUMS_FILE,
    manifest_problems,
    read_sums,
    side_files,
)
from xtoken.schemas.configs.share import PullConfig, PushConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import (
    MANIFEST,
    AnyManifest,
    CaptureManifest,
    ProjectionManifest,
    content_hash,
    digest,
    parse_manifest,
    provenance,
    read_any_manifest,
)
from xtoken.schemas.ui.progress import Progress


def pull(config: PullConfig, bars: Progress) -> dict[str, Any]:
    """Fetch an artifact or a subset of one; the same command resumes.

    Returns:
        kind, parts, files, bytes_copied, bytes_kept, bytes_per_second, destination, result.

    Raises:
        XtokenError: no artifact there, a subset that cannot be, or a destination that holds something else.
        VerificationError: a file is not what its record says; it does not appear at the destination.
    """
    source, manifest = _open(config.source)
    shipment = _shipment(config, source, manifest, _wanted(config, manifest), card=not is_subset(config))
    return transfer(replace(shipment, verb="pull"), config.destination, config.workers, bars)


def push(config: PushConfig, bars: Progress) -> dict[str, Any]:
    """Publish an artifact or a subset of one, a capture with its card; the source is only read. See ``pull``.

    Raises:
        XtokenError: besides what ``pull`` raises, a capture without card and licences.
    """
    source, manifest = _open(config.source)
    licenses, wanted = given_licenses(config.license), _wanted(config, manifest)
    if not isinstance(wanted, CaptureManifest):
        if licenses:
            raise XtokenError(f"--license is of a capture, and {config.source} holds {manifest.kind}; leave it out")
        shipment = _shipment(config, source, manifest, wanted, card=True)
    elif _card_serves(config, source, wanted, licenses):
        shipment = _shipment(config, source, manifest, wanted, card=True)
    else:
        shipment = _with_card(config, source, manifest, wanted, licenses or wanted.licenses)
    return transfer(shipment, config.destination, config.workers, bars)


def _card_serves(config: PushConfig, source: Folder, wanted: CaptureManifest, licenses: dict[str, str]) -> bool:
    """Whether the source's own card describes what is pushed."""
    with reachable(source.root):
        there = source.exists(CARD_FILE)
    return there and not is_subset(config) and licenses in ({}, wanted.licenses)


def _with_card(
    config: PushConfig, source: Folder, manifest: AnyManifest, wanted: CaptureManifest, licenses: dict[str, str]
) -> Shipment:
    """A shipment whose card is written from what is shipped."""
    _refuse_unlicensed(config, licenses)
    if licenses != wanted.licenses:
        # the version stays: it says how the parts are to be read
        wanted = wanted.model_copy(update={"licenses": licenses, **provenance()})
    shipment = _shipment(config, source, manifest, wanted, card=False)
    rewritten = any(job.rewrite for job in shipment.parts)
    return replace(shipment, card=partial(_card, config.destination if rewritten else config.source))


def _card(root: str, manifest: AnyManifest) -> list[SideFile]:
    """The card of a capture whose parts and tables lie in ``root``."""
    assert isinstance(manifest, CaptureManifest), "only captures have cards"
    files = card_files(root, manifest, manifest.licenses, None)
    return [SideFile(name, data=data) for name, data in files.items()]


def _open(root: str) -> tuple[Folder, AnyManifest]:
    with reachable(root):
        check_manifest(Folder(root))
        return Folder(root), read_any_manifest(root)


def check_manifest(source: Folder) -> None:
    """Raise VerificationError where manifest.json is not the file that SHA256SUMS vouches for."""
    for problem in manifest_problems(source):
        raise VerificationError(f"{source.root}: {problem}; fetch or build that artifact again")


def _wanted(config: PullConfig, manifest: AnyManifest) -> AnyManifest:
    """The destination's manifest; of a subset, without parts."""
    refuse_subset(config, manifest)
    if not is_subset(config) or isinstance(manifest, ProjectionManifest):
        return manifest
    if isinstance(manifest, CaptureManifest):
        return subset_manifest(config, manifest)
    return manifest.model_copy(update=provenance())


def _shipment(
    config: PullConfig, source: Folder, manifest: AnyManifest, wanted: AnyManifest, *, card: bool
) -> Shipment:
    """What is to be copied; ``card``: with the source's own."""
    rewrite: Rewrite | None = None
    set_aside: list[int] = []
    if isinstance(manifest, CaptureManifest):
        rewrite, set_aside = capture_rewrite(config, manifest), list(manifest.set_aside)
    chosen = chosen_parts(config.parts, manifest.parts, set_aside)
    claim = {
        "kind": manifest.kind,
        "content": digest(manifest.files) if isinstance(manifest, ProjectionManifest) else content_hash(manifest),
        "parts": config.parts,
        "where": config.where,
        "columns": config.columns,
        "licenses": wanted.licenses if isinstance(wanted, CaptureManifest) else {},
    }
    jobs = [PartJob(source, part, part.index, rewrite) for part in chosen]
    # with --where the plan no longer says which samples a part has (it cuts the text of captures without)
    files = [*_sides(source, manifest), *_optional(source, manifest, card=card, plan=config.where is None)]
    return Shipment("push", claim, jobs, files, wanted, _verbatim(source, manifest) if wanted is manifest else None)


def _verbatim(source: Folder, manifest: AnyManifest) -> bytes:
    """The manifest as its file has it: an older version stays one."""
    with reachable(source.root):
        data = source.read(MANIFEST)
    if parse_manifest(data, source.url(MANIFEST)) != manifest:
        raise XtokenError(f"{source.url(MANIFEST)} changes while it is read; wait for its writer, then run this again")
    return data


def _sides(source: Folder, manifest: AnyManifest) -> list[SideFile]:
    """The tables every artifact of this kind has.

    Raises:
        VerificationError: the manifest does not record one, or records what is not a file of ours.
    """
    names = side_files(manifest)
    for name in sorted(set(manifest.files) - set(names)):
        raise VerificationError(f"the manifest in {source.root} names {name!r}, which is not a file of {manifest.kind}")
    for name in names:
        if name not in manifest.files:
            raise VerificationError(f"the manifest in {source.root} records no {name}; fetch or build it again")
    return [SideFile(name, source, manifest.files[name]) for name in names]


def _optional(source: Folder, manifest: AnyManifest, *, card: bool, plan: bool) -> list[SideFile]:
    """The files beside the tables that are there."""
    wanted = [name for name in OPTIONAL_FILES[manifest.kind] if plan or name != PLAN_FILE]
    return copied_files(source, [name for name in wanted if card or name not in (CARD_FILE, *PLOTS)])


def copied_files(source: Folder, names: Sequence[str]) -> list[SideFile]:
    """Those of these names, which are ours, that are there, with their sha256 where SHA256SUMS has it."""
    with reachable(source.root):
        there = set(source.names())
        if PLOT_FOLDER in there and set(names).intersection(PLOTS):
            there.update(f"{PLOT_FOLDER}/{name}" for name in source.names(PLOT_FOLDER))
        sums = read_sums(source) if SUMS_FILE in there else {}
    return [SideFile(name, source, sums.get(name)) for name in names if name in there]


def _refuse_unlicensed(config: PushConfig, licenses: dict[str, str]) -> None:
    if not licenses:
        raise XtokenError(
            f"{config.source} has no licences and so no card for what is pushed: give them as --license "
            "corpus=ID,outputs=ID (of the text, and of the teacher's outputs), or write a card first with "
            f"'xtoken share card {config.source} --license corpus=ID,outputs=ID'"
        )
