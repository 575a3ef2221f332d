"""What a capture will cost, from the parts of a capture that exists: no teacher runs, so speed stays unknown."""

import math
from dataclasses import dataclass
from typing import Any

from xtoken.pipeline.capture.estimate.pilot import interval
from xtoken.pipeline.capture.estimate.sampling import POOL, Pool, Ratio, ratio, take_pool
from xtoken.pipeline.store.codecs import open_codec
from xtoken.schemas.configs.capture import CorpusGroup
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Progress


@dataclass(frozen=True)
class Likeness:
    """Another capture, as a measure of this corpus.

    Attributes:
        pool: the corpus.
        tokens_per_byte, disk: tokens per byte of text and bytes per token, of the other capture, with their errors.
        entries_per_row: of the other capture.
        settings: which those figures are of, in words.
        vocab: bytes of the token tables; the other capture's parts do not say.
    """

    pool: Pool
    tokens_per_byte: Ratio
    disk: Ratio
    entries_per_row: float
    settings: str
    vocab: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Of the other capture's parts."""
        return self.disk.value

    def figures(self, text_bytes: int) -> dict[str, Any]:
        """What a run over so many bytes of text takes, and how sure that is."""
        tokens = self.tokens_per_byte
        total = tokens.value * text_bytes
        return {
            **interval("tokens", total, tokens.error),
            "tokens_per_byte": tokens.value,
            **interval("disk_bytes", total * self.disk.value, math.hypot(tokens.error, self.disk.error)),
            "entries_per_row": self.entries_per_row,
        }

    @property
    def time(self) -> dict[str, Any]:
        """What is said instead of hours."""
        return {"hours": "unknown: a capture does not record its speed; leave --like out to time a pilot"}


def read_likeness(corpus: CorpusGroup, shard_bytes: int, like: str, progress: Progress) -> Likeness:
    """Read the corpus once, and the manifest of another capture.

    Raises:
        XtokenError: ``like`` is not a finished capture, or holds no tokens, or the corpus is bad.
    """
    manifest = read_manifest(like, CaptureManifest)
    parts = [part for part in manifest.parts if part.tokens and part.text_bytes]
    if not parts:
        raise XtokenError(f"--like {like} holds no tokens to go by; name another capture, or leave it out")
    counts = [part.tokens for part in parts]
    return Likeness(
        pool=take_pool(corpus, shard_bytes, POOL, progress),
        # another corpus than the capture's is of parts that were not seen
        tokens_per_byte=ratio(counts, [part.text_bytes for part in parts], 0.0),
        disk=ratio([part.file_bytes for part in parts], counts, 0.0),
        entries_per_row=sum(part.entries for part in parts) / max(sum(part.rows for part in parts), 1),
        settings=f"those of {like}: {open_codec(manifest.codec).brief}, {manifest.max_tokens} tokens per sample, "
        f"teacher {manifest.teacher.model}",
    )
