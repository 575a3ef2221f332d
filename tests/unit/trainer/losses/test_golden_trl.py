"""ULD and GOLD against TRL's own numbers (tests/golden/trl_uld_*.json), value and gradient.

What differs between TRL and the losses here lies in what a loss is shown, and is set up by hand in this file:

* TRL's ``observed`` merge takes the logits AT the answer's positions, which predict the token after. The row paired
  with token k is thus the one that predicts k + 1, and it is multiplied by the probability that such rows give to the
  wrong tokens. Shown these rows and these tokens, ``merge=first`` computes the same. ``bayesian`` is shifted by one,
  as it should be, and is ``merge=last``.
* TRL averages over the groups of a sample, then over samples, and has two temperatures and no factor tau squared.
  ``terms`` has neither the mean nor the factor, and the teacher's temperature is in the stored targets.
* TRL raises matched probabilities to at least 1e-8 before the logarithm. The losses here do not (except q at
  beta = 1), which is where their only numerical difference comes from.

Shapes: T tokens of a side's sample, P the answer's positions, C groups.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.losses.base import Loss, LossSetup, ProjectionArrays, View, VocabArrays
from xtoken.trainer.losses.gold import GOLD
from xtoken.trainer.losses.uld import ULD

GOLDEN = Path(__file__).parents[3] / "golden"
FILES = ["trl_uld_01", "trl_uld_03", "trl_uld_05", "trl_uld_07"]
ROUNDED = 1e-9  # the files hold nine digits
CLAMPED = 1e-7  # cells that TRL raises to 1e-8 differ by less than that each, and in a row of few tokens only


def load(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


RUNS = [(name, run) for name in FILES for run in range(len(load(name)["runs"]))]


def build(data: Any, hyper: Any) -> Loss:
    pairs = sorted((s, t) for t, s in data["inputs"]["vocab_mapping_teacher_to_student"])
    student, teacher = (np.array(ids, np.int32) for ids in zip(*pairs, strict=True))
    every = np.ones(len(pairs), np.bool_)
    w = ProjectionArrays(student, teacher, every.astype(np.float32), every, every)
    width, size = data["student_vocab_size"], data["teacher_vocab_size"]
    merge = {"observed": "first", "bayesian": "last"}[hyper["uld_token_merge_strategy"]]
    setup = LossSetup(
        w,
        VocabArrays.of([b""] * width, ["special"] * width),
        width,
        size,
        torch.device("cpu"),
        LossOptions(beta=hyper["beta"]),
        hyper["uld_student_temperature"],
        merge,
    )
    if not hyper["uld_use_hybrid_loss"]:
        return ULD(setup)
    loss = GOLD(setup)
    if hyper["uld_hybrid_matched_weight"] is not None:  # no option here: |M| / V_T is the definition
        weights = (hyper["uld_hybrid_matched_weight"], hyper["uld_hybrid_unmatched_weight"])
        loss.matched = loss.matched._replace(weight=weights[0], other_weight=weights[1])
    return loss


def answer(groups: Sequence[Sequence[int]], start: int, merge: str) -> tuple[list[int], list[int]]:
    """Rows and tokens of all groups one after the other, as positions of the sample."""
    tokens = [start + position for group in groups for position in group]
    return [token - (merge == "bayesian") for token in tokens], tokens


def teacher_columns(data: Any, hyper: Any, sample: int, found: Any, gold: bool) -> dict[str, Any]:
    """What 'xtoken align' would store of the teacher's whole rows."""
    merge, inputs = hyper["uld_token_merge_strategy"], data["inputs"]
    groups = found["teacher_groups"]
    rows, tokens = answer(groups, found["answer_start_teacher"], merge)
    logits = torch.tensor(inputs["teacher_logits"][sample], dtype=torch.float64) / hyper["uld_teacher_temperature"]
    logp = logits.log_softmax(-1)[rows].numpy()
    realised = logp[np.arange(len(rows)), np.array(inputs["teacher_input_ids"][sample])[tokens]]
    student_of = dict(inputs["vocab_mapping_teacher_to_student"])
    matched = np.array(sorted(student_of)) if gold else np.zeros(0, np.int64)
    others = np.setdiff1d(np.arange(data["teacher_vocab_size"]), matched)
    ends, factor, lists = np.cumsum([len(group) for group in groups]), [], []
    for end, group in zip(ends, groups, strict=True):
        span = np.arange(end - len(group), end)
        kept = span[0] if merge == "observed" else span[-1]
        factor.append(realised[span].sum() - realised[kept])
        lists.append((logp[kept, matched], np.sort(logp[kept, others])[::-1]))
    name = "gold_other" if gold else "uld"
    columns = {
        "factor_logprob": np.array(factor),
        f"{name}_count": [len(others)] * len(groups),
        f"{name}_logprob": np.concatenate([rest for _, rest in lists]),
    }
    if not gold:
        return columns
    return columns | {
        "gold_count": [len(matched)] * len(groups),
        "gold_ids": np.array([student_of[t] for t in matched.tolist()] * len(groups)),
        "gold_logprob": np.concatenate([row for row, _ in lists]),
    }


def sample_terms(
    data: Any, hyper: Any, sample: int, found: Any, z_TV: Tensor, make_view: Callable[..., View]
) -> Tensor:
    """The product's terms of the sample's groups, [C]."""
    loss, groups = build(data, hyper), found["student_groups"]
    rows, tokens = answer(groups, found["answer_start_student"], hyper["uld_token_merge_strategy"])
    length = [len(group) for group in groups]
    ids = np.array(data["inputs"]["student_input_ids"][sample])[tokens]
    columns = teacher_columns(data, hyper, sample, found, hyper["uld_use_hybrid_loss"])
    first = np.cumsum(length) - length
    return loss.terms(make_view(z_TV[rows], first, length, columns, loss.temperature, label=ids))


@pytest.mark.parametrize(("name", "index"), RUNS)
def test_value_and_gradient(name: str, index: int, make_view: Callable[..., View]) -> None:
    data = load(name)
    run = data["runs"][index]
    hyper = run["hyper"]
    z_BTV = torch.tensor(data["inputs"]["student_logits"], dtype=torch.float64, requires_grad=True)
    total = z_BTV.sum() * 0
    bound = CLAMPED if hyper["uld_use_hybrid_loss"] else ROUNDED
    for sample, found in enumerate(run["per_sample"]):
        terms = sample_terms(data, hyper, sample, found, z_BTV[sample], make_view)
        mean = terms.mean()
        assert float(mean.detach()) == pytest.approx(found["sample_loss"], abs=bound), sample
        total = total + mean / len(z_BTV)
    assert float(total.detach()) == pytest.approx(run["loss_f64"], abs=bound)
    (grad,) = torch.autograd.grad(total, z_BTV)
    golden = torch.tensor(run["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, golden, rtol=1e-7, atol=bound if hyper["uld_use_hybrid_loss"] else 1e-11)
