"""ALM against tokenkit's own numbers (tests/golden/alm_*.json), value and gradient.

What differs lies around the divergence, and is set up by hand in this file:

* ``binary_ce`` is our ``binary-kl`` plus the teacher's entropy, a constant: the gradient is the same.
* A chunk that holds nothing but the first token has no likelihood there and takes no part. Here it has no position.
* tokenkit weighs chunks (by 1, by their teacher tokens, by log(1 + tokens)) and divides by a sum over its global
  batch, in which merged counts went through the merge map twice, and once more by the number of chunk sizes. The
  files hold these counts: the terms are weighed and divided with them. Where that sum is 0 the reference is nan.
* ``distill_chunk_sizes`` joins every n chunks. There is no such option here: this file joins them.
* ``eos_as_space`` takes eos for the only token that starts with a space.

Shapes: T tokens, C chunk columns, G chunks after joining.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.losses.alm import ALM, EPS
from xtoken.trainer.losses.base import LossSetup, ProjectionArrays, View, VocabArrays

GOLDEN = Path(__file__).parents[3] / "golden"
FILES = ["alm_01", "alm_03", "alm_05", "alm_07"]
ROUNDED = 1e-8  # the files hold nine digits
MODES = {"binary_ce": "binary-kl", "reverse_binary_kl": "reverse", "binary_kl_temp_limit": "limit", "abs": "abs"}
# By run: the loss is nan (an empty column's inf times weight 0), or nothing but the chunks is a number (divided by 0).
NAN_LOSS, NAN_ALL = {("alm_01", 5)}, {("alm_05", 5)}


def load(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


RUNS = [(name, run) for name in FILES for run in range(len(load(name)["runs"]))]


class Side(NamedTuple):
    """One side of a sample: where each column's tokens start and end (equal: none of them can be predicted), and the
    log-probabilities [T, V] of which row t follows token t."""

    start: list[int]
    end: list[int]
    logp_TV: Tensor
    ids: list[int]
    space: list[int]


def read_side(inputs: Any, side: str, sample: int, logits: Tensor, eos_as_space: bool) -> Side:
    matrix = (
        np.array(inputs[f"alignment_matrix_{side}"][sample]) * np.array(inputs[f"loss_mask_{side}"][sample])[:, None]
    )
    tokens = [np.flatnonzero(column) for column in matrix.T]
    assert all((np.diff(column) == 1).all() for column in tokens), "columns without holes"
    start = [max(1, int(column[0])) if len(column) else 0 for column in tokens]
    end = [int(column[-1]) + 1 if len(column) else 0 for column in tokens]
    space = [inputs[f"eos_id_{side}"]] if eos_as_space else np.flatnonzero(inputs[f"space_mask_{side}"]).tolist()
    return Side(start, end, logits.log_softmax(-1), inputs[f"input_ids_{side}"][sample], space)


def columns_of(teacher: Side) -> tuple[list[int], dict[str, Any]]:
    """Columns of which the teacher predicts a token, and what 'xtoken align' would store of them."""
    used = [c for c, (start, end) in enumerate(zip(teacher.start, teacher.end, strict=True)) if end > start]
    logp = teacher.logp_TV.numpy()
    realised = [sum(logp[t - 1, teacher.ids[t]] for t in range(teacher.start[c], teacher.end[c])) for c in used]
    space = [float(teacher.logp_TV[teacher.end[c] - 1, teacher.space].logsumexp(0)) for c in used]
    return used, {"teacher_logprob": np.array(realised), "alm_space_logprob": np.array(space)}


def joined(used: Sequence[int], size: int) -> list[list[int]]:
    """Columns joined ``size`` at a time, counted with the unused ones."""
    groups: dict[int, list[int]] = {}
    for c in used:
        groups.setdefault(c // size, []).append(c)
    return list(groups.values())


def merged(loss: ALM, used: Sequence[int], arrays: Any) -> list[list[int]]:
    """Columns joined by the product's own rule; it tells where each group ends."""
    ends, _ = loss.regroup(np.arange(1, len(used) + 1), arrays)
    return [list(part) for part in np.split(np.array(used), ends[:-1])]


def build(hyper: Any, mode: str, student: Side) -> ALM:
    debias = [
        name
        for name, word in (("outcome", "append_space"), ("merge", "merge_by_space_prob"))
        if word in hyper["alm_mode"]
    ]
    width = student.logp_TV.shape[1]
    vocab = VocabArrays.of([b" " if i in student.space else b"x" for i in range(width)], [None] * width)
    none = ProjectionArrays(*(np.zeros(0, kind) for kind in (np.int32, np.int32, np.float32, bool, bool)))
    options = LossOptions(
        alm=mode,
        alm_tau=hyper["binarization_temp"],
        debias=debias,
        alm_threshold=hyper["tokenizer_pair_bias_threshold"],
    )
    return ALM(LossSetup(none, vocab, width, 1, torch.device("cpu"), options))


def view_of(student: Side, groups: Sequence[Sequence[int]], columns: Any) -> View:
    """Position t predicts token t + 1; the last has no label, it only says what follows the last chunk."""
    first = [student.start[group[0]] - 1 for group in groups]
    last = [student.end[group[-1]] for group in groups]
    length = [stop - at - 1 for at, stop in zip(first, last, strict=True)]
    label, first_C, length_C = (torch.tensor(values) for values in ([*student.ids[1:], 0], first, length))
    return View(first_C, length_C, torch.tensor(last) - 1, columns, logp_PV=student.logp_TV, label_P=label)


class Result(NamedTuple):
    """Per chunk of one sample and size: the divergence, the teacher's log-likelihood, the student's, its tokens."""

    terms: Tensor
    teacher: Tensor
    student: Tensor
    tokens: list[int]


def score(hyper: Any, student: Side, teacher: Side, size: int) -> Result:
    loss = build(hyper, MODES[hyper["alm_diff_fn"]], student)
    used, arrays = columns_of(teacher)
    groups = merged(loss, used, arrays) if loss.merge else joined(used, size)
    place = {c: i for i, c in enumerate(used)}
    columns = {
        "teacher_logprob": [arrays["teacher_logprob"][[place[c] for c in group]].sum() for group in groups],
        "alm_space_logprob": [arrays["alm_space_logprob"][place[group[-1]]] for group in groups],
    }
    if loss.merge:
        regrouped = loss.regroup(np.arange(1, len(used) + 1), arrays)[1]
        for name, values in columns.items():
            np.testing.assert_allclose(regrouped[name], values, rtol=1e-12)
    tensors = {name: torch.tensor(np.array(values)) for name, values in columns.items()}
    nothing = {name: torch.zeros_like(values) for name, values in tensors.items()}
    # |0 - l| is the student's likelihood; the teacher's plus its space term is what it is compared with.
    student_C = -build(hyper, "abs", student).terms(view_of(student, groups, nothing))
    teacher_C = tensors["teacher_logprob"] + (tensors["alm_space_logprob"] if loss.outcome else 0)
    tokens = [sum(teacher.end[c] - teacher.start[c] for c in group) for group in groups]
    return Result(loss.terms(view_of(student, groups, tensors)), teacher_C, student_C, tokens)


def entropy(hyper: Any, teacher_C: Tensor) -> Tensor:
    """What ``binary_ce`` has over the binary KL."""
    if hyper["alm_diff_fn"] != "binary_ce":
        return torch.zeros_like(teacher_C)
    p = (teacher_C / hyper["binarization_temp"] - EPS).exp()
    total_C: Tensor = p * p.log() + (1 - p) * (1 - p).log()
    return -total_C


def weights(rule: str, tokens: Any) -> Any:
    tokens = np.asarray(tokens, np.float64)
    return {"chunk_count": (tokens > 0) * 1.0, "token_count": tokens, "log1p_token_count": np.log1p(tokens)}[rule]


def split_logits(data: Any) -> list[Tensor]:
    return [torch.tensor(z, dtype=torch.float64, requires_grad=True) for z in data["inputs"]["student_logits"]]


def score_all(data: Any, hyper: Any, leaves: Sequence[Tensor]) -> list[list[Result]]:
    """By sample, then by chunk size."""
    eos, found = "eos_as_space" in hyper["alm_mode"], []
    for sample, leaf in enumerate(leaves):
        student = read_side(data["inputs"], "student", sample, leaf, eos)
        logits = torch.tensor(data["inputs"]["teacher_logits"][sample], dtype=torch.float64)
        teacher = read_side(data["inputs"], "teacher", sample, logits, eos)
        found.append([score(hyper, student, teacher, size) for size in hyper["distill_chunk_sizes"]])
    return found


@pytest.mark.parametrize(("name", "index"), RUNS)
def test_chunk_likelihoods(name: str, index: int) -> None:
    """Both sides' likelihoods after joining, with the space term, and the teacher tokens of each chunk."""
    data = load(name)
    run = data["runs"][index]
    for sample, results in enumerate(score_all(data, run["hyper"], split_logits(data))):
        count = np.array(run["chunk_token_count"][sample])
        assert [n for result in results for n in result.tokens] == count[count > 0].tolist()
        for field, side in (("teacher_chunk_logp", "teacher"), ("student_chunk_logp", "student")):
            ours = torch.cat([getattr(result, side) for result in results]).detach().numpy()
            np.testing.assert_allclose(ours, np.array(run[field][sample])[count > 0], rtol=ROUNDED)


@pytest.mark.parametrize(("name", "index"), [run for run in RUNS if run not in NAN_ALL])
def test_value_and_gradient(name: str, index: int) -> None:
    data = load(name)
    run = data["runs"][index]
    hyper, leaves = run["hyper"], split_logits(data)
    numerator, sizes = hyper["distill_main_path_numerator"], len(hyper["distill_chunk_sizes"])
    total = torch.zeros((), dtype=torch.float64)
    for results in score_all(data, hyper, leaves):
        for result in results:
            weight = torch.tensor(weights(numerator, result.tokens))
            total = total + ((result.terms + entropy(hyper, result.teacher)) * weight).sum()
    # means over all columns of the local and of the global batch
    local, whole = np.array(run["chunk_token_count"]), np.array(run["global_chunk_token_count"])
    total = total / local.size / weights(hyper["distill_main_path_denominator"], whole).mean() / sizes
    if (name, index) in NAN_LOSS:
        assert run["loss_f64"] == "nan"
    else:
        assert float(total.detach()) == pytest.approx(run["loss_f64"], rel=ROUNDED)
    grads = torch.autograd.grad(total, leaves)
    golden = torch.tensor(run["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(grads), golden, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize(("name", "index"), sorted(NAN_ALL))
def test_reference_divides_by_zero(name: str, index: int) -> None:
    """Counts that went through the merge map twice are all 0; ours is the mean over the chunks there are."""
    data = load(name)
    run = data["runs"][index]
    assert run["loss_f64"] == "nan"
    assert not np.array(run["global_chunk_token_count"]).any()
    leaves = split_logits(data)
    terms = torch.cat([result.terms for results in score_all(data, run["hyper"], leaves) for result in results])
    assert math.isfinite(float(terms.mean().detach()))
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(terms.mean(), leaves))
