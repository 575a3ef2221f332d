"""Copying artifacts: staged, checked by sha256, then put; data, commit records, side files, and the manifest last.

Only names that our code builds are read and written. A copy that was stopped anywhere goes on where it was: a part
counts as copied when its commit record and a file of its size are there. ``share.json`` says meanwhile whose copy a
folder is, and goes when the manifest is there.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from xtoken.pipeline.share.destination import (
    Destination,
    Swept,
    again_if_swept,
    open_destination,
    reachable,
    remove_if_there,
)
from xtoken.pipeline.share.shipment import (
    CLAIM_FILE,
    PartJob,
    Shipment,
    SideFile,
    differences,
    differing,
    read_claim,
    refuse_other,
)
from xtoken.pipeline.store.files import Folder, disk_full_named
from xtoken.pipeline.store.publish import COMMITS, DATA, clean, commit_name, data_name, read_commit
from xtoken.pipeline.store.seal import CARD_FILE, PLOT_FOLDER, SUMS_FILE, sums_text
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import MANIFEST, AnyManifest, Part, part_name, read_any_manifest
from xtoken.schemas.ui.progress import Progress

_FOLDERS = (DATA, COMMITS, PLOT_FOLDER)
# What a new repository of a hub holds by itself.
_HARMLESS = {".gitattributes", CLAIM_FILE}


@dataclass
class _Meter:
    """Progress and a stop sign shared by threads."""

    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    copied: int = 0

    def tell(self, amount: int) -> None:
        """Add bytes read; raises when another thread has failed."""
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.progress.advance(amount)

    def put(self, amount: int) -> None:
        """Add bytes put."""
        with self.lock:
            self.copied += amount


class _Stopped(Exception):
    """Another thread failed; never seen by a user."""


def transfer(shipment: Shipment, root: str, workers: int, progress: Progress) -> dict[str, Any]:
    """Fill ``root`` with a shipment; what is there of it already is kept.

    Args:
        root: folder or URL.
        workers: files copied at once.

    Returns:
        kind, parts, files, bytes_copied, bytes_kept, bytes_per_second, destination, result.

    Raises:
        XtokenError: the destination holds something else (nothing is copied then), or cannot be used.
        VerificationError: a source file is missing, a link, or not what its record says; it does not appear.
    """
    with closing(open_destination(root)) as destination:
        return _Transfer(shipment, destination, workers, _Meter(progress)).run()


def record_bytes(part: Part) -> bytes:
    """Content of a commit record."""
    return part.model_dump_json(indent=1).encode() + b"\n"


def fetch(source: Folder, name: str, path: str, tell: Callable[[int], None], limit: int | None = None) -> str:
    """Copy a source file to a local path; returns its sha256. Reading stops above ``limit`` bytes.

    Raises:
        VerificationError: missing, a symbolic link, or longer than ``limit``.
        XtokenError: the source cannot be used.
    """
    if source.is_link(name) or ("/" in name and source.is_link(name.split("/")[0])):
        raise VerificationError(f"{source.url(name)} is a symbolic link; an artifact holds plain files only")
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "wb") as file:
            for block in source.blocks(name):
                size += len(block)
                if limit is not None and size > limit:
                    raise VerificationError(f"{source.url(name)} is longer than its record says, {limit} bytes")
                digest.update(block)
                with disk_full_named(os.path.dirname(path)):
                    file.write(block)
                tell(len(block))
    except FileNotFoundError as error:
        raise VerificationError(f"{source.url(name)} is missing; fetch or build that artifact again") from error
    return digest.hexdigest()


@dataclass
class _Transfer:
    shipment: Shipment
    destination: Destination
    workers: int
    meter: _Meter
    sums: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """See ``transfer``."""
        began, root = time.monotonic(), self.destination.folder.root
        with reachable(root):
            finished = self._settle()
            kept = self._kept(finished)
        progress, verb = self.meter.progress, self.shipment.verb
        total, before = self._sizes(kept)
        complete = finished is not None and self._is_complete(finished, kept)
        label = f"{root} is complete, nothing to do" if complete else verb
        progress.start(label, total, "bytes", total if complete else before)
        if complete:
            parts = sorted(kept.values(), key=lambda part: part.index)
            with reachable(root):
                self._drop_claim()
        else:
            parts = self._fill(kept)
        progress.finish()
        seconds = max(time.monotonic() - began, 1e-9)
        copied = self.meter.copied
        return {
            "kind": self.shipment.manifest.kind,
            "parts": len(parts),
            "files": len(self.shipment.files) if complete else len(self.sums) - 2 * len(parts) - 1,
            "bytes_copied": copied,
            "bytes_kept": sum(part.file_bytes for part in kept.values()),
            "bytes_per_second": copied / seconds,
            "destination": root,
            "result": "complete already, nothing to do" if complete else "complete",
        }

    def _settle(self) -> AnyManifest | None:
        """The destination's manifest if it is this copy's; refuses a destination of something else, claims a new one.

        Raises:
            XtokenError: what is there, and how it differs.
        """
        folder, claim = self.destination.folder, self.shipment.claim
        for name in _FOLDERS:
            if folder.is_link(name):
                raise XtokenError(f"{folder.url(name)} is a symbolic link; give a new folder as destination")
        names = [name for name in folder.names() if not name.endswith(".tmp")]
        if MANIFEST in names:
            existing = read_any_manifest(folder.root)
            refuse_other(folder.root, differences(existing, self.shipment))
            return existing
        foreign = sorted(set(names) - _HARMLESS)
        if foreign and CLAIM_FILE not in names:
            raise XtokenError(
                f"{folder.root} holds {foreign[0]!r} and no {CLAIM_FILE}: no share command wrote it; "
                "give a new folder as destination"
            )
        self.destination.make(*_FOLDERS[:2])
        if not self.destination.claim(CLAIM_FILE, json.dumps(claim, indent=1).encode() + b"\n"):
            there = read_claim(folder)
            refuse_other(folder.root, differing(there, claim))
        if folder.local:  # not before: another copy may be under way
            clean(folder.root)
        return None

    def _kept(self, finished: AnyManifest | None) -> dict[int, Part]:
        """Parts that are there already, by their new number."""
        folder = self.destination.folder
        sizes, records = folder.sizes(DATA), set(folder.names(COMMITS))
        jobs = [job for job in self.shipment.parts if os.path.basename(commit_name(job.index)) in records]
        listed = None if finished is None else {part.index: part for part in finished.parts}
        recorded = self._each(self._record, jobs)
        kept = {}
        for job, part in zip(jobs, recorded, strict=True):
            wanted = job.wanted or (part if listed is None else listed.get(job.index))
            if part is not None and part == wanted and sizes.get(part_name(job.index)) == part.file_bytes:
                kept[job.index] = part
        return kept

    def _record(self, job: PartJob) -> Part | None:
        try:
            return read_commit(self.destination.folder, job.index)
        except VerificationError:
            return None  # copied again

    def _is_complete(self, finished: AnyManifest, kept: dict[int, Part]) -> bool:
        folder = self.destination.folder
        with reachable(folder.root):
            names = {*folder.names(), *(f"{PLOT_FOLDER}/{name}" for name in folder.names(PLOT_FOLDER))}
        wanted = {SUMS_FILE, *(file.name for file in self.shipment.files), *([CARD_FILE] if self.shipment.card else [])}
        return wanted <= names and sorted(kept) == [part.index for part in finished.parts]

    def _sizes(self, kept: dict[int, Part]) -> tuple[int, int]:
        """Bytes of all source parts, and of those kept."""
        sizes = {job.index: job.part.file_bytes for job in self.shipment.parts}
        return sum(sizes.values()), sum(sizes[index] for index in kept)

    def _fill(self, kept: dict[int, Part]) -> list[Part]:
        """Copy what is missing; returns all parts in order."""
        waiting = [job for job in self.shipment.parts if job.index not in kept]
        made = [part for part in self._each(self._ship, waiting) if part is not None]
        parts = sorted([*kept.values(), *made], key=lambda part: part.index)
        if self.shipment.parts and not parts:
            with reachable(self.destination.folder.root):
                self._drop_claim()
            raise XtokenError(f"no sample is left: {self.shipment.claim}; choose a wider subset")
        for part in parts:
            self.sums[data_name(part.index)] = part.sha256
            self.sums[commit_name(part.index)] = hashlib.sha256(record_bytes(part)).hexdigest()
        for file in self.shipment.files:
            self._side(file)
        manifest = self.shipment.manifest.model_copy(update={"parts": parts})
        if self.shipment.card is not None:
            if any(job.rewrite for job in self.shipment.parts):
                with reachable(self.destination.folder.root):
                    self.destination.flush()  # the card is written from what is there
            for file in self.shipment.card(manifest):
                self._side(file)
        self._finish(manifest)
        return parts

    def _finish(self, manifest: AnyManifest) -> None:
        shipment, root = self.shipment, self.destination.folder.root
        data = shipment.verbatim or manifest.model_dump_json(indent=1).encode() + b"\n"
        self.sums[MANIFEST] = hashlib.sha256(data).hexdigest()
        with reachable(root):
            self.destination.write(SUMS_FILE, sums_text(self.sums))
            self.destination.write(MANIFEST, data)
            self._drop_claim()
            existing = read_any_manifest(root)
        if existing.model_dump() != manifest.model_dump():
            raise VerificationError(f"{root}/{MANIFEST} does not read back as written; run the same command again")

    def _drop_claim(self) -> None:
        self.destination.drop(CLAIM_FILE)
        self.destination.flush()

    def _side(self, file: SideFile) -> None:
        """Copy or write one side file."""
        again_if_swept(partial(self._side_once, file))

    def _side_once(self, file: SideFile) -> None:
        staged, root = self.destination.staging(file.name), self.destination.folder.root
        try:
            if file.source is None:
                with disk_full_named(self.destination.staging_root), open(staged, "wb") as handle:
                    handle.write(file.data)
                sha256 = hashlib.sha256(file.data).hexdigest()
            else:
                with reachable(file.source.root):
                    sha256 = fetch(file.source, file.name, staged, self._nothing)
            if file.sha256 is not None and sha256 != file.sha256:
                raise VerificationError(_other(file.source, file.name, sha256, file.sha256))
            self.sums[file.name] = sha256
            with reachable(root):
                self._put(staged, file.name)
        finally:
            remove_if_there(staged)

    def _nothing(self, amount: int) -> None:
        """Side files are outside the progress, which counts parts."""

    def _ship(self, job: PartJob) -> Part | None:
        """Copy one part and its record; None when nothing of it is left."""
        return again_if_swept(partial(self._ship_once, job))

    def _ship_once(self, job: PartJob) -> Part | None:
        name = data_name(job.part.index)
        staged, made = (self.destination.staging(data_name(job.index)) for _ in range(2))
        try:
            with reachable(job.source.root):
                sha256 = fetch(job.source, name, staged, self.meter.tell, job.part.file_bytes)
            if sha256 != job.part.sha256:
                raise VerificationError(_other(job.source, name, sha256, job.part.sha256))
            part = self._rewritten(job, staged, made)
            if part is None:
                return None
            part = part.model_copy(update={"index": job.index})
            with reachable(self.destination.folder.root):
                self._put(staged if job.rewrite is None else made, data_name(job.index))
                self.destination.write(commit_name(job.index), record_bytes(part))
            return part
        finally:
            remove_if_there(staged)
            remove_if_there(made)

    def _rewritten(self, job: PartJob, staged: str, made: str) -> Part | None:
        if job.rewrite is None:
            return job.part
        try:
            return job.rewrite(staged, job.part, made)
        except (OSError, XtokenError) as error:
            if isinstance(error, FileNotFoundError) or not os.path.exists(staged):
                raise Swept(self.destination.folder.root) from error
            raise

    def _put(self, path: str, name: str) -> None:
        try:
            size = os.path.getsize(path)
        except FileNotFoundError:
            raise Swept(self.destination.folder.root) from None
        if "/" in name and name.split("/")[0] == PLOT_FOLDER:
            self.destination.make(PLOT_FOLDER)
        self.destination.put(path, name)
        self.meter.put(size)

    def _each(self, work: Callable[[PartJob], Part | None], jobs: Iterable[PartJob]) -> list[Part | None]:
        """Results in order; the first error ends the others at their next block and is raised."""
        with ThreadPoolExecutor(self.workers) as pool:
            futures: list[Future[Part | None]] = [pool.submit(work, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.meter.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _other(source: Folder | None, name: str, sha256: str, wanted: str) -> str:
    where = name if source is None else source.url(name)
    return (
        f"{where} has sha256 {sha256[:12]}, recorded is {wanted[:12]}: it was not copied, what is copied stays; "
        "fetch or build that artifact again"
    )
