"""What codecs make of a teacher's whole rows: the most probable entries, draws, and both together.

A ``Rows`` is what align makes targets of: entries and REST that sum to 1. Draws are points on the cumulative
distribution in order of ids: independent ones, or systematic ones (``(i + u) / N`` with one ``u`` per row, so that each
id gets ``N p`` draws rounded up or down). Behind a head of kept entries, n draws of what is left carry REST / n each.

Shapes: R rows, U teacher vocabulary, E entries of a head, N points of a row, K kept entries of all rows together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.align.kernels_rows import normalised
from xtoken.pipeline.align.rows import Rows
from xtoken.pipeline.store.codecs.topk import Packed, decode, encode
from xtoken.pipeline.teachers.base import TeacherRows
from xtoken.pipeline.teachers.logit_rows import top_k

ENTRIES = 128
BLOCK = 64
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """One point of the figure.

    Attributes:
        family: topk | drop | independent | systematic | head+tail.
        k, min_p: of the kept entries, where there are any.
        draws: per row; for head+tail 0 says ceil(REST * ``per_mass``), at most so many.
    """

    family: str
    k: int = 0
    min_p: float = 0.0
    draws: int = 0
    per_mass: int = 0

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds to average over."""
        return SEEDS if self.draws or self.per_mass else SEEDS[:1]

    @property
    def label(self) -> str:
        """As points are named in the plot."""
        if self.per_mass:
            return f"p≥1/{self.per_mass} + {self.per_mass}·REST"
        if not self.k:
            return f"N {self.draws}"
        kept = f"k {self.k}" + (f", p {self.min_p:g}".replace("0.", ".") if self.min_p else "")
        return f"{kept} + {self.draws}" if self.draws else kept


TOPK = [Setting("topk", k) for k in (8, 16, 32, 64, 128)]
FLOORED = [*(Setting("topk", 64, p) for p in (0.001, 0.003, 0.01)), Setting("topk", 128, 0.001)]
DROPPED = [Setting("drop", 32)]
DRAWN = [Setting(family, draws=n) for family in ("independent", "systematic") for n in (12, 50, 200)]
TAILED = [
    *(Setting("head+tail", 128, 1 / n, per_mass=n) for n in (12, 50, 200)),
    *(Setting("head+tail", 64, 0.003, n) for n in (4, 16)),
    *(Setting("head+tail", 16, 0.0, n) for n in (4, 16)),
]
SETTINGS = [*TOPK, *FLOORED, *DROPPED, *DRAWN, *TAILED]
DEFAULT = Setting("topk", 64, 0.003)


def head_of(logprob_RU: Tensor) -> TeacherRows:
    """The first entries of whole rows, as an engine gives them."""
    top, ids = top_k(logprob_RU, ENTRIES)
    nothing = np.zeros(len(ids), np.float32)
    return TeacherRows(ids.int().numpy(), top.numpy(), nothing, nothing.astype(np.int32))


def packed(head: TeacherRows, setting: Setting, size: int) -> Packed:
    """The head as the codec keeps it."""
    cut = replace(head, ids=head.ids[:, : setting.k], logprob=head.logprob[:, : setting.k])
    return encode(cut, k=setting.k, min_p=setting.min_p, vocab_size=size)


def kept_rows(head: TeacherRows, setting: Setting, size: int) -> Rows:
    """The head through the codec and back; ``drop`` renormalises it without REST."""
    found = packed(head, setting, size)
    back = decode(found.kept, found.topk_ids, found.topk_gap, found.rest_gap)
    rest_R = np.full(len(found.kept), -np.inf) if setting.family == "drop" else back.tail_logprob
    logprob_K, rest_R = normalised(back.offsets, back.logprob, rest_R)
    return Rows.of(back.offsets, back.ids, logprob_K, rest_R)


def points(family: str, count_R: NDArray[np.int64], seed: int, first_row: int) -> Iterator[NDArray[np.float64]]:
    """Points in 0 to 1 for each row, ascending."""
    for row, count in enumerate(count_R.tolist()):
        random = np.random.default_rng((seed, first_row + row))
        if family == "independent":
            yield np.sort(random.random(count))
        else:
            yield (np.arange(count) + random.random()) / max(count, 1)


def draw(cumulative_RU: NDArray[np.float64], row_points: Iterator[NDArray[np.float64]]) -> list[NDArray[np.int64]]:
    """Ids drawn in each row, ascending, repeated as often as drawn."""
    size = cumulative_RU.shape[1]
    return [
        np.minimum(np.searchsorted(up_to_U, at * up_to_U[-1], side="right"), size - 1)
        for up_to_U, at in zip(cumulative_RU, row_points, strict=True)
    ]


def rows_of(ids: list[NDArray[np.int64]], head: Rows | None = None) -> Rows:
    """Rows of draws alone, or of a head whose REST the draws share."""
    all_ids, all_log, counts = [], [], []
    for row, drawn in enumerate(ids):
        seen, times = np.unique(drawn, return_counts=True)
        mass = 0.0 if head is None else head.rest[row]
        log = mass + np.log(times / max(len(drawn), 1))
        if head is not None:
            low, high = head.offsets[row], head.offsets[row + 1]
            seen, log = np.concatenate([head.ids[low:high], seen]), np.concatenate([head.logprob[low:high], log])
        all_ids.append(seen.astype(np.int32))
        all_log.append(log)
        counts.append(len(seen))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rest_R = np.array([-np.inf if head is None or len(drawn) else head.rest[row] for row, drawn in enumerate(ids)])
    logprob_K, rest_R = normalised(offsets, np.concatenate(all_log), rest_R)
    return Rows.of(offsets, np.concatenate(all_ids), logprob_K, rest_R)


def tail_counts(head: Rows, setting: Setting) -> NDArray[np.int64]:
    """Draws behind each row's head, none where it left nothing."""
    rest_R = np.exp(head.rest)
    wanted = np.ceil(rest_R * setting.per_mass) if setting.per_mass else np.full(len(rest_R), setting.draws)
    return np.where(rest_R > 0, wanted, 0).astype(np.int64)


def all_rows(logprob_RU: Tensor, settings: list[Setting], first_row: int = 0) -> dict[tuple[Setting, int], Rows]:
    """Every setting's rows by (setting, seed), made block by block of the whole ones."""
    blocks: dict[tuple[Setting, int], list[Rows]] = {(s, seed): [] for s in settings for seed in s.seeds}
    for start in range(0, len(logprob_RU), BLOCK):
        block_RU = logprob_RU[start : start + BLOCK]
        head, p_RU = head_of(block_RU), block_RU.double().exp()
        cumulative_RU = p_RU.cumsum(dim=1).numpy()
        for setting in settings:
            made = _block(setting, head, p_RU, cumulative_RU, first_row + start)
            for seed, rows in zip(setting.seeds, made, strict=True):
                blocks[setting, seed].append(rows)
    return {key: joined(found) for key, found in blocks.items()}


def _block(
    setting: Setting, head: TeacherRows, p_RU: Tensor, cumulative_RU: NDArray[np.float64], first_row: int
) -> Iterator[Rows]:
    size = p_RU.shape[1]
    if setting.family in ("topk", "drop"):
        yield kept_rows(head, setting, size)
        return
    if setting.family != "head+tail":
        count_R = np.full(len(p_RU), setting.draws)
        for seed in setting.seeds:
            yield rows_of(draw(cumulative_RU, points(setting.family, count_R, seed, first_row)))
        return
    kept = kept_rows(head, setting, size)
    left_RU = p_RU.clone()
    row_K = torch.repeat_interleave(torch.arange(len(p_RU)), torch.from_numpy(np.diff(kept.offsets)))
    left_RU[row_K, torch.from_numpy(kept.ids).long()] = 0
    up_to_RU, count_R = left_RU.cumsum_(dim=1).numpy(), tail_counts(kept, setting)
    for seed in setting.seeds:
        yield rows_of(draw(up_to_RU, points("systematic", count_R, seed, first_row)), kept)


def joined(parts: list[Rows]) -> Rows:
    """Rows of blocks as one."""
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ids, logprob, rest = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprob", "rest")
    )
    return Rows.of(offsets, ids, logprob, rest)
