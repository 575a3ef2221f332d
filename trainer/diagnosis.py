"""What is wrong with a step, sample by sample."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from xtoken.trainer.data.batches import StepBatch
from xtoken.trainer.data.micro_batch import Micro, TeacherTargets
from xtoken.trainer.run import write_json
from xtoken.trainer.score import Sums, score
from xtoken.trainer.step import seed_all
from xtoken.trainer.watch import Diagnosis, SampleScore, Verdict

if TYPE_CHECKING:
    from xtoken.trainer.start import Training

DIAGNOSIS = "diagnosis.json"


def diagnose(training: "Training", batch: StepBatch, verdict: Verdict, seed: str) -> Diagnosis:
    """Score every sample of the step alone, on the weights that it began with; all ranks must call it.

    The first rank leaves the whole list in the run's diagnosis.json.
    """
    ranks = training.ranks
    alone = [one for micro in batch.micros for one in single_samples(micro)]
    rows = []
    for at in range(int(ranks.max(len(alone)))):  # a sharded model runs on all ranks or none
        micro = alone[min(at, len(alone) - 1)]
        seed_all(seed, micro)
        row = _score(training, micro)
        rows += [row] if at < len(alone) else []
    scores = [one for part in ranks.gather(rows) for one in part]
    diagnosis = Diagnosis(training.counted.step + 1, verdict, scores)
    if ranks.first:
        write_json(training.run.root / DIAGNOSIS, diagnosis.record())
    return diagnosis


def _score(training: "Training", micro: Micro) -> SampleScore:
    teachers = len(micro.targets)
    with torch.no_grad():
        sums = training.wrapped(score, micro, (0.0,) * (1 + teachers))[1].tolist()
    totals = [targets.total for targets in micro.targets]
    plain = Sums.of(sums, teachers).plain
    kd = tuple(value / total if total else None for value, total in zip(plain, totals, strict=True))
    tokens = len(micro.label_P)
    return SampleScore(micro.sample_ids[0], tokens, sums[0] / max(1, tokens), kd)


def single_samples(micro: Micro) -> Iterator[Micro]:
    """Each sample of a micro-batch as one of its own."""
    for number, sample_id in enumerate(micro.sample_ids):
        low, high = np.searchsorted(micro.sample_P, [number, number + 1]).tolist()
        if low < high:
            place_P = micro.place_P[low:high]
            # up to the last input that predicts something; the sample's first is at position 0
            first, stop = int(place_P[0] - micro.position_BL.flat[place_P[0]]), int(place_P[-1]) + 1
            yield Micro(
                sample_ids=(sample_id,),
                input_BL=micro.input_BL.reshape(1, -1)[:, first:stop],
                position_BL=np.arange(stop - first, dtype=np.int64)[None],
                place_P=place_P - first,
                label_P=micro.label_P[low:high],
                sample_P=np.zeros(high - low, np.int64),
                targets=tuple(_alone(targets, number, low, high) for targets in micro.targets),
            )


def _alone(targets: TeacherTargets, number: int, low: int, high: int) -> TeacherTargets:
    """One sample's, of positions ``low`` to ``high`` of a micro-batch."""
    chunks = targets.slice(low, high)
    return TeacherTargets.of(chunks, np.zeros(len(chunks.first_C), np.int64), targets.weight_B[number : number + 1])
