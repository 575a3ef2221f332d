"""What others' rows are tested for before anything is written: the shift, the calibration, sums, and the tokenizer.

A test is over the rows of a few thousand tokens from all over the files; what it finds goes into the manifest.

Shapes: T tokens and R rows of a sample, E entries of all its rows.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.rows import CleanRows, clean, places
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Reader, Slice
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.imported import RankShare

SHIFTS = (-2, -1, 0, 1, 2)
_WINS = 5.0  # times the mean stored probability of the next best shift; right ones win ten times over
_BUCKETS = (("1", 1, 1), ("2-8", 2, 8), ("9-32", 9, 32))
_APART = 2.5  # times; right files agree within 1.3
_JUDGED = 20  # rows of a bucket, found or expected, below which chance decides
_WHOLE, _ALL = 1e-4, 0.99  # renormalised: sums within this of 1, in this share of rows
_ABOVE = 0.05  # of rows that add up to more than 1
_SAME = 0.5  # of the documents must get the same ids; a teacher may write what its tokenizer would not
_TAIL_TOKENS = 8  # of a cut document, which its tokenizer may end otherwise
LOOKED_ROWS, _LOOKED_SLICES = 1 << 13, 16


@dataclass
class Look:
    """What some samples say.

    Attributes:
        rows, samples: looked at.
        tokens: int32 arrays, the ids of the samples.
        stored: by shift, the sum over rows of the stored probability of the token that stands there, and the rows.
        ranked, mass: by bucket of ranks, rows whose label is there, and the mass of the entries there.
        near_one, above_one, far_above: rows whose listed sum is within 1e-4 of 1, above 1, above 1.01.
        above_zero: an entry has a probability above 1.
        whole, same: documents that were tokenized again, and those with the same ids.
        left_out: by reason.
        first_rows: samples whose first token has a row.
        control: samples with control tokens inside.
    """

    rows: int = 0
    samples: int = 0
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    stored: dict[int, list[float]] = field(default_factory=lambda: {shift: [0.0, 0.0] for shift in SHIFTS})
    ranked: list[int] = field(default_factory=lambda: [0] * len(_BUCKETS))
    mass: list[float] = field(default_factory=lambda: [0.0] * len(_BUCKETS))
    near_one: int = 0
    above_one: int = 0
    far_above: int = 0
    above_zero: bool = False
    whole: int = 0
    same: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first_rows: int = 0
    control: int = 0
    unknown: int = 0

    def add(self, sample: ImportedSample, spelling: Spelling) -> None:
        """Count one sample."""
        found = clean(sample, spelling.valid)
        self.samples, self.rows = self.samples + 1, self.rows + found.rows
        self.tokens.append(sample.ids)
        self.first_rows += sample.first_row == 0
        inner = sample.ids[:-1] if sample.complete else sample.ids
        self.control += bool(spelling.control[inner].any())
        self._shift(sample, found)
        self._ranks(found)
        listed = found.log_sums() if sample.listed_logprob is None else sample.listed_logprob
        some = np.isfinite(listed)
        self.near_one += int((np.abs(np.expm1(np.minimum(listed[some], 1.0))) < _WHOLE).sum())
        self.far_above += int((listed[some] > np.log(1.01)).sum())
        self.above_one += int((found.log_sums() > _WHOLE).sum())
        self.above_zero |= bool((found.logprob > _WHOLE).any())
        self.unknown += int(np.isnan(found.label_logprob).sum())
        if sample.chat is None:
            self._retokenize(sample, spelling)

    def _shift(self, sample: ImportedSample, found: CleanRows) -> None:
        token_R = places(sample)
        p_E = np.exp(np.minimum(found.logprob, 0.0))
        for shift in SHIFTS:
            at_R = token_R + shift
            inside_R = (at_R >= 0) & (at_R < len(sample.ids))
            label_R = np.where(inside_R, sample.ids[np.clip(at_R, 0, len(sample.ids) - 1)], -1)
            self.stored[shift][0] += float(p_E[found.ids == label_R[found.row]].sum())
            self.stored[shift][1] += int(inside_R.sum())

    def _ranks(self, found: CleanRows) -> None:
        """The last place of a row is left out: servers put a sampled token there that is less probable."""
        count_R = np.bincount(found.row, minlength=found.rows)
        p_E = np.where(
            (found.rank + 1 < count_R[found.row]) | (count_R[found.row] == 1),
            np.exp(np.minimum(found.logprob, 0.0)),
            0.0,
        )
        rank_R = np.where((found.label_rank < count_R) | (count_R == 1), found.label_rank, 0)
        for at, (_, low, high) in enumerate(_BUCKETS):
            self.ranked[at] += int(((rank_R >= low) & (rank_R <= high)).sum())
            self.mass[at] += float(p_E[(found.rank + 1 >= low) & (found.rank + 1 <= high)].sum())

    def _retokenize(self, sample: ImportedSample, spelling: Spelling) -> None:
        spelt = spelling.text(sample.ids)
        self.whole += 1
        if spelt is None:
            return
        try:
            again = spelling.tokenizer.encode(spelt[0], complete=sample.complete).ids
        except XtokenError:  # tokens and text have nothing in common
            return
        stop = len(sample.ids) if sample.complete else max(1, len(sample.ids) - _TAIL_TOKENS)
        self.same += bool(np.array_equal(again[:stop], sample.ids[:stop]))

    @property
    def shares(self) -> dict[int, float]:
        """Mean stored probability of the token, by shift."""
        return {shift: total / max(1.0, rows) for shift, (total, rows) in self.stored.items()}

    @property
    def calibration(self) -> list[RankShare]:
        """Shares of rows whose label has some ranks, and the mean mass there."""
        rows = max(1, self.rows)
        return [
            RankShare(ranks=name, share=hits / rows, mass=mass / rows)
            for (name, _, _), hits, mass in zip(_BUCKETS, self.ranked, self.mass, strict=True)
        ]

    @property
    def best_shift(self) -> int:
        """The shift with the largest mean stored probability."""
        shares = self.shares
        return max(SHIFTS, key=lambda shift: (shares[shift], -abs(shift)))

    @property
    def renormalised(self) -> bool:
        """Whether rows add up to 1 without a tail, so that what is not listed is not known."""
        return self.rows > 0 and self.near_one >= _ALL * self.rows

    @property
    def same_ids(self) -> float | None:
        """Share of documents whose text has the same ids when it is tokenized again."""
        return self.same / self.whole if self.whole else None


def look(reader: Reader, spelling: Spelling, slices: Sequence[Slice]) -> Look:
    """Look at samples from all over the files; the same for the same files.

    Raises:
        XtokenError: there is no sample, or a row is damaged.
    """
    found = Look()
    for one in _samples(reader, slices):
        if isinstance(one, LeftOut):
            found.left_out[one.reason] += 1
        else:
            found.add(one, spelling)
    if not found.rows:
        first = reader.source.files[0]
        if not found.left_out:
            raise XtokenError(f"{first} holds no row that says anything; name files with rows")
        why = ", ".join(f"{reason} ({count})" for reason, count in found.left_out.most_common(3))
        raise XtokenError(f"{first} holds nothing that can be imported: {why}; is --tokenizer right?")
    return found


def _samples(reader: Reader, slices: Sequence[Slice]) -> Iterator[ImportedSample | LeftOut]:
    """The first samples of evenly spaced slices."""
    stride = -(-len(slices) // _LOOKED_SLICES) if slices else 1
    chosen = slices[::stride]
    for wanted in chosen:
        rows = left = 0
        for one in reader.read(wanted):
            yield one
            rows += len(one.offsets) if isinstance(one, ImportedSample) else 0
            left += isinstance(one, LeftOut)
            if rows >= LOOKED_ROWS // len(chosen) or left >= LOOKED_ROWS // len(chosen):
                break


def refuse_other_tokenizer(found: Look, tokenizer: str, blameless: Collection[str] = ()) -> None:
    """Refuse a tokenizer that would write most documents with other ids, or cannot read them.

    Args:
        found: by a look.
        tokenizer: its name.
        blameless: reasons for which samples are left out whatever the tokenizer.

    Raises:
        XtokenError: the message says how many.
    """
    if found.whole and found.same < _SAME * found.whole:
        raise XtokenError(
            f"of {found.whole} documents that were looked at, {found.whole - found.same} are no text in the tokens of "
            f"{tokenizer}, or get other ids when that text is tokenized again (at most half may): the set is of "
            "another tokenizer; give the teacher's with --tokenizer"
        )
    left_out = Counter({reason: count for reason, count in found.left_out.items() if reason not in blameless})
    lost = left_out.total()
    if lost > found.samples:
        reason, count = left_out.most_common(1)[0]
        raise XtokenError(
            f"{lost} of the first {lost + found.samples} documents cannot be imported, {count} of them for {reason!r}; "
            "is --tokenizer that of the set?"
        )


def refuse_shift(found: Look, format_name: str) -> None:
    """Refuse rows that do not predict the tokens that stand where the format says.

    Raises:
        XtokenError: no shift stands out, or another one does.
    """
    shares, best = found.shares, found.best_shift
    others = max(value for shift, value in shares.items() if shift != best)
    said = ", ".join(f"{shift:+d}: {value:.4f}" for shift, value in shares.items())
    if not shares[best] > _WINS * others:
        raise XtokenError(
            f"over {found.rows:,} rows no token stands out as the one that a row predicts (mean stored probability by "
            f"shift: {said}; one must be {_WINS:g} times the others): --tokenizer or --compression is not that of the "
            "set, or its rows are damaged"
        )
    if best:
        raise XtokenError(
            f"rows of this {format_name} set predict the token {best:+d} from where the format says (mean stored "
            f"probability by shift: {said}); it was written by other code, and is not imported"
        )


def refuse_sums(found: Look, hint: str) -> None:
    """Refuse rows that are no probabilities.

    Args:
        found: by a look.
        hint: what to check, of the format.

    Raises:
        XtokenError: too many of them add up to more than 1.
    """
    if found.above_one > _ABOVE * found.rows:
        raise XtokenError(
            f"{found.above_one / found.rows:.0%} of {found.rows:,} rows add up to more than 1 (at most {_ABOVE:.0%} "
            f"may): they are no log-probabilities as they were read; {hint}"
        )


def refuse_uncalibrated(found: Look, hint: str) -> None:
    """Refuse rows whose probabilities are not the shares at which their tokens occur.

    Args:
        found: by a look.
        hint: what to check, of the format.

    Raises:
        XtokenError: at some ranks they differ by more than 2.5 times.
    """
    for one in found.calibration:
        judged = max(one.share, one.mass) * found.rows >= _JUDGED
        low, high = sorted((one.share, one.mass))
        if judged and high > _APART * low:
            raise XtokenError(
                f"tokens of the text have rank {one.ranks} in {one.share:.1%} of {found.rows:,} rows, and the rows "
                f"give these ranks {one.mass:.1%} (at most {_APART:g} times apart): the rows were decoded wrongly; "
                f"{hint}"
            )
