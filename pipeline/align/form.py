"""How a folder of targets holds its columns: as the parts that are there do, else in the newest version."""

from xtoken.pipeline.align.code_use import token_codes
from xtoken.pipeline.align.rows import Recipe
from xtoken.pipeline.project.projection import Projection
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import committed, data_name
from xtoken.pipeline.store.reader import read_table
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import VerificationError
from xtoken.schemas.io.parquet_limits import reading
from xtoken.schemas.io.remote import read_footer
from xtoken.schemas.manifest import CaptureManifest
from xtoken.schemas.tables import CHAT_TARGETS, LEAN_TARGETS, targets
from xtoken.schemas.target_form import CODES_FILE, TargetForm, TokenCodes, needs_codes

WRITTEN = LEAN_TARGETS  # version of the schema, of targets of text


def open_form(config: AlignConfig, capture: CaptureManifest, projection: Projection) -> TargetForm:
    """The form of the parts of ``config.out``, in the codes that lie beside them.

    Raises:
        VerificationError: parts are there without their codes, or these are damaged.
    """
    version, codes = (_version(config) if capture.chat is None else CHAT_TARGETS), None
    if needs_codes(config.losses, version):
        if Folder(config.out).exists(CODES_FILE):
            there = read_table(Folder(config.out).url(CODES_FILE))
            codes = TokenCodes.of(there, projection.teacher.size, projection.student.size)
        elif committed(config.out):
            raise VerificationError(
                f"{config.out} holds parts without {CODES_FILE}, which names their tokens; remove that folder and run "
                "the same command again"
            )
        else:
            codes = token_codes(config.captures[0], capture, projection, config.unreached)
    recipe = Recipe(config.losses, config.merge, config.tau, capture.codec, config.entries, rest_lost(capture))
    return TargetForm(config.losses, version, recipe.step, codes)


def rest_lost(capture: CaptureManifest) -> bool:
    """Whether a capture was imported from rows whose tail mass nobody knows."""
    return capture.imported is not None and not capture.imported.whole_rest


def _version(config: AlignConfig) -> int:
    """Of the schema: a folder that an older release began goes on in its version, so that no folder holds two."""
    newest, older = WRITTEN, LEAN_TARGETS - 1
    for index in sorted(committed(config.out)):
        path = Folder(config.out).url(data_name(index))
        try:
            with reading(path, ""):
                stored = read_footer(path).schema.to_arrow_schema()
        except VerificationError:  # 'xtoken verify' says so; the next part tells as much
            continue
        return newest if stored.equals(targets(config.losses, newest)) else older
    return newest
