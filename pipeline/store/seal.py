"""SHA256SUMS: one line per file of an artifact, as ``sha256sum -c`` reads it, so that every byte is vouched for.

The manifest vouches for parts and tables; this file for the manifest, the commit records, the card and the plan too.
It is written last. Names in it are compared with the names an artifact of its kind has, and never followed.
"""

import re
from collections.abc import Iterator, Mapping

from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import commit_name, data_name
from xtoken.pipeline.store.reader import MERGES_FILE, VOCAB_FILE
from xtoken.pipeline.store.skip_records import BAD_FILE, SKIPPED_FILE
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.manifest import MANIFEST, AnyManifest, TargetManifest, read_any_manifest
from xtoken.schemas.target_form import CODES_FILE, needs_codes

SUMS_FILE = "SHA256SUMS"
CARD_FILE = "README.md"
PLAN_FILE = "plan.json"
PLOT_FOLDER = "plots"
PLOTS = tuple(f"{PLOT_FOLDER}/{name}.png" for name in ("bytes-per-token", "entries-per-row", "entropy", "mass-kept"))
SIDE_FILES = {
    "capture": (VOCAB_FILE, MERGES_FILE),
    "targets": ("w.parquet", "unreached.parquet", "student_vocab.parquet"),
    "projection": ("w.parquet", "unreached.parquet"),
}
# Files that an artifact may have or not.
OPTIONAL_FILES = {
    "capture": (CARD_FILE, PLAN_FILE, BAD_FILE, SKIPPED_FILE, *PLOTS),
    "targets": (CARD_FILE, SKIPPED_FILE),
    "projection": ("coverage.html",),
}
# Files that releases before 0.6 wrote and did not list in SHA256SUMS: they may be there without a line.
_UNSEALED_ONCE = (SKIPPED_FILE,)
# Versions from which on an artifact has SHA256SUMS; a projection may be without.
_SUMS_SINCE = {"capture": 2, "targets": 3}
_LINE = re.compile(r"([0-9a-f]{64})  ([ -~]{1,200})")


def side_files(manifest: AnyManifest) -> tuple[str, ...]:
    """Names of the tables beside the parts, each of which the manifest records."""
    names = SIDE_FILES[manifest.kind]
    if isinstance(manifest, TargetManifest) and needs_codes(manifest.losses, manifest.parts_version):
        return (*names, CODES_FILE)
    return names


def sums_text(sums: Mapping[str, str]) -> bytes:
    """Content of SHA256SUMS from the sha256 of each file by its name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def read_sums(folder: Folder) -> dict[str, str]:
    """The sha256 of each file by its name.

    Raises:
        FileNotFoundError: there is none.
        VerificationError: it is not of the form that ``sums_text`` writes.
    """
    text = folder.read(SUMS_FILE).decode(errors="replace")
    matches = [_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    sums = {match[2]: match[1] for match in matches if match is not None}
    if sums_text(sums).decode() != text:
        raise VerificationError(
            f"{folder.url(SUMS_FILE)} is damaged: a line is not a sha256 and a name, or out of order"
        )
    return sums


def seal(root: str) -> None:
    """Write SHA256SUMS of a finished artifact; nothing is written where it says so already.

    Raises:
        VerificationError: a file that never changes once it is sealed is not what an earlier seal says: a new one would
            hide the damage.
    """
    folder, manifest = Folder(root), read_any_manifest(root)
    _refuse_changed(folder, manifest)
    sums = {data_name(part.index): part.sha256 for part in manifest.parts}
    names = [MANIFEST, *side_files(manifest), *(commit_name(part.index) for part in manifest.parts)]
    sums |= {name: folder.sha256(name)[0] for name in [*names, *_present(folder, manifest)]}
    text = sums_text(sums)
    if not folder.exists(SUMS_FILE) or folder.read(SUMS_FILE) != text:
        folder.replace(SUMS_FILE, text)


def _refuse_changed(folder: Folder, manifest: AnyManifest) -> None:
    try:
        sealed = read_sums(folder)
    except (FileNotFoundError, VerificationError):
        return  # not sealed yet, or the seal itself is what is damaged
    lasting = [*side_files(manifest), PLAN_FILE, BAD_FILE, SKIPPED_FILE]
    lasting += [commit_name(part.index) for part in manifest.parts]
    changed = [name for name in lasting if name in sealed and _sum(folder, name) != sealed[name]]
    if changed:
        raise VerificationError(
            f"{folder.url(changed[0])} is not what {SUMS_FILE} of the finished {manifest.kind} says: it was changed or "
            f"removed since; fetch the {manifest.kind} again, or make it again with another --out"
        )


def _present(folder: Folder, manifest: AnyManifest) -> list[str]:
    """The optional files that are there."""
    there = {*folder.names(), *(f"{PLOT_FOLDER}/{name}" for name in folder.names(PLOT_FOLDER))}
    return [name for name in OPTIONAL_FILES[manifest.kind] if name in there]


def manifest_problems(folder: Folder) -> Iterator[str]:
    """Whether manifest.json contradicts SHA256SUMS, to be said before anything in it is believed."""
    try:
        recorded, (actual, _) = read_sums(folder).get(MANIFEST, "nothing"), folder.sha256(MANIFEST)
    except (FileNotFoundError, VerificationError):
        return  # older, damaged or no artifact: what reads it says so
    if actual != recorded:
        yield f"{MANIFEST}: sha256 {actual[:12]}, {SUMS_FILE} says {recorded[:12]}"


def seal_problems(folder: Folder, manifest: AnyManifest) -> Iterator[str]:
    """What contradicts SHA256SUMS; parts and tables are compared with the manifest elsewhere."""
    try:
        sums = read_sums(folder)
    except FileNotFoundError:
        since = _SUMS_SINCE.get(manifest.kind)
        if since is not None and manifest.schema_version >= since:
            yield f"{SUMS_FILE} is missing"
        return
    except VerificationError as error:
        yield str(error)
        return
    recorded = {data_name(part.index): part.sha256 for part in manifest.parts} | manifest.files
    small = [commit_name(part.index) for part in manifest.parts] + _present(folder, manifest)
    for name in [*small, *recorded]:
        actual = recorded.get(name) or _sum(folder, name)
        if sums.get(name) != actual and not (name in _UNSEALED_ONCE and name not in sums):
            yield f"{name}: sha256 {actual[:12]}, {SUMS_FILE} says {sums.get(name, 'nothing')[:12]}"
    for name in sorted(set(sums) - {MANIFEST, *small, *recorded}):
        yield f"{SUMS_FILE}: {name!r} is not there, or no file of this artifact"


def _sum(folder: Folder, name: str) -> str:
    try:
        return folder.sha256(name)[0]
    except FileNotFoundError:
        return "missing"
