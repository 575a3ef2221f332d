"""Our P-KL, H-KL, sparse KL and their sum with CE against numbers of NVIDIA's NeMo-RL: values and gradients.

``tests/golden/README.md`` says where they come from.

Every comparison goes through ``Loss.terms``. Where the published loss differs by design, the difference is derived
beside the test, so that what remains to compare is exact.

Shapes: B samples, T positions, V and U student and teacher vocabulary, K kept teacher columns.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import LossSetup, ProjectionArrays, VocabArrays
from xtoken.trainer.losses.ce import cross_entropy
from xtoken.trainer.mixing import Mixing

GOLDEN = Path(__file__).parents[3] / "golden"
PRINTED = 1e-7  # the files hold nine digits
EPSILON = 1e-10  # added by the published code before a division and before a logarithm
# W passes through float32 (6e-8 relative), and probabilities down to 1e-4 have the epsilon added (1e-6 relative, times
# their own small weight).
THROUGH_W = 1e-6
FLOAT32 = 1e-5  # the published float32 value, and ours, of sums of some hundred terms


def runs(pattern: str) -> list[Any]:
    """Every run of every file."""
    found = []
    for path in sorted(GOLDEN.glob(pattern)):
        content = json.loads(path.read_text())
        for number, run in enumerate(content["runs"]):
            found.append(pytest.param(content["inputs"], run, id=f"{path.stem}-{number}"))
    return found


def spans(chunk_BT: Any, valid_BC: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """(sample, chunk) -> flat positions, of the valid chunks, in order of position."""
    found: dict[tuple[int, int], list[int]] = {}
    for b, row in enumerate(chunk_BT):
        for position, chunk in enumerate(row):
            if chunk >= 0 and valid_BC[b, chunk]:
                found.setdefault((b, chunk), []).append(b * len(row) + position)
    return found


def flat_logits(rows_BTV: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """[B * T, V]."""
    return torch.tensor(rows_BTV, dtype=dtype).flatten(0, 1)


def setup_of(w: ProjectionArrays, sizes: tuple[int, int], run: Any, **options: Any) -> LossSetup:
    """A loss over chunk means at the run's temperature and direction."""
    vocab = VocabArrays(np.zeros(sizes[0], np.bool_), np.zeros(0, np.int32), np.zeros(sizes[0], np.int32))
    chosen = LossOptions(kl="reverse" if run["reverse_kl"] else "forward", **options)
    return LossSetup(w, vocab, *sizes, torch.device("cpu"), chosen, tau=run["temperature"], merge="mean")


def assert_equals(run: Any, loss: Tensor, z: Tensor, bound: float) -> None:
    """The run's loss and gradient; without a valid chunk the published loss is a constant."""
    assert float(loss.detach()) == pytest.approx(run["loss_f64"], rel=bound, abs=bound)
    if run["grad_student_logits"] is None:
        assert not loss.requires_grad
        return
    (grad,) = torch.autograd.grad(loss, z)
    expected = torch.tensor(run["grad_student_logits"], dtype=grad.dtype).flatten(0, 1)
    torch.testing.assert_close(grad, expected, rtol=bound, atol=bound)


class PKLCase:
    """What a run of ``nemo_pkl_*`` holds, as tensors.

    Attributes:
        q_K: per valid chunk, mean over its teacher positions of log_softmax(logits / T) of the kept columns.
        reached_K: the kept columns that some row of W reaches.
    """

    def __init__(self, inputs: Any, run: Any, dtype: torch.dtype = torch.float64) -> None:
        self.run, self.W = run, np.array(inputs["W"], np.float64)
        self.z = flat_logits(inputs["student_logits"], dtype).requires_grad_()
        valid = np.array(run["valid_chunk"])
        self.student = spans(inputs["student_chunk_id"], valid)
        teacher = spans(inputs["teacher_chunk_id"], valid)
        self.top = np.array(run["global_top_indices"])
        kept = flat_logits(inputs["teacher_logits"], dtype)[:, self.top]
        logp = torch.log_softmax(kept / run["temperature"], -1)
        self.q_K = {chunk: logp[teacher[chunk]].mean(0) for chunk in self.student}
        self.reached_K = torch.from_numpy(self.W[:, self.top].sum(0) > 0)

    def literal(self, chunk: tuple[int, int], epsilon: float = EPSILON) -> Tensor:
        """The published formula of one chunk, as it stands (without T^2). Without epsilon, over the reached columns."""
        W_VK = torch.from_numpy(self.W[:, self.top])
        p_K = (torch.softmax(self.z[self.student[chunk]] / self.run["temperature"], -1) @ W_VK).mean(0)
        q_K = self.q_K[chunk]
        if epsilon == 0:
            p_K, q_K = p_K[self.reached_K], q_K[self.reached_K]
        logp_K = (p_K / (p_K.sum() + epsilon) + epsilon).log()
        cells_K = logp_K.exp() * (logp_K - q_K) if self.run["reverse_kl"] else q_K.exp() * (q_K - logp_K)
        return cells_K.sum()

    def unreached(self, chunk: tuple[int, int]) -> Tensor:
        """What kept columns that W does not reach add to the published loss: their probability is epsilon."""
        q, floor = self.q_K[chunk][~self.reached_K], np.log(EPSILON)
        cells: Tensor = EPSILON * (floor - q) if self.run["reverse_kl"] else q.exp() * (q - floor)
        return cells.sum()

    def ours(self, make_view: Any) -> dict[tuple[int, int], Tensor]:
        """Our P-KL of each chunk, turned into the published one.

        The published teacher is not renormalised: with c its mass on the reached kept columns it is c times ours, and
            sum_K c p (log(c p) - log q) = c (KL(p||q) + log c)      forward
            sum_K q (log q - log(c p))   = KL(q||p) - log c          reverse
        """
        if not self.student:
            return {}
        q_K = [self.q_K[chunk][self.reached_K] for chunk in self.student]
        logc = [q.logsumexp(0) for q in q_K]
        s, t = np.nonzero(self.W)
        flags = np.zeros(len(s), np.bool_)
        w = ProjectionArrays(s.astype(np.int32), t.astype(np.int32), self.W[s, t].astype(np.float32), flags, flags)
        ids = self.top[self.reached_K.numpy()]
        loss = open_loss("p-kl", setup_of(w, self.W.shape, self.run))
        columns = {
            "pkl_count": np.full(len(q_K), len(ids)),
            "pkl_ids": np.tile(ids, len(q_K)),
            "pkl_logprob": torch.cat([q - c for q, c in zip(q_K, logc, strict=True)]),
            "pkl_rest_logprob": np.full(len(q_K), np.nan),
        }
        positions = list(self.student.values())
        view = make_view(self.z, [p[0] for p in positions], [len(p) for p in positions], columns, loss.temperature)
        terms = zip(self.student, loss.terms(view), logc, strict=True)
        if self.run["reverse_kl"]:
            return {chunk: kl - c for chunk, kl, c in terms}
        return {chunk: c.exp() * (kl + c) for chunk, kl, c in terms}


@pytest.mark.parametrize(("inputs", "run"), runs("nemo_pkl_*.json"))
def test_pkl(inputs: Any, run: Any, make_view: Any) -> None:
    case = PKLCase(inputs, run)
    total = torch.zeros((), dtype=torch.float64)
    for chunk, kl in case.ours(make_view).items():
        literal = case.literal(chunk)
        assert float(literal.detach()) == pytest.approx(
            run["per_chunk_kl"][chunk[0]][chunk[1]], rel=PRINTED, abs=PRINTED
        )
        # Where nearly nothing is projected into the kept columns the epsilons are the loss. Ours has none.
        plain = case.literal(chunk, epsilon=0) + case.unreached(chunk)
        if abs(float((literal - plain).detach())) < THROUGH_W:
            assert float((kl + case.unreached(chunk)).detach()) == pytest.approx(
                float(literal.detach()), rel=THROUGH_W, abs=THROUGH_W
            )
            total = total + kl + case.unreached(chunk)
        else:
            total = total + literal
    if case.student:
        total = total * run["temperature"] ** 2 / len(case.student)
    assert_equals(run, total, case.z, THROUGH_W)


@pytest.mark.parametrize(("inputs", "run"), runs("nemo_pkl_0[1-5].json"))
def test_no_pkl_chunk_of_these_files_is_left_to_the_literal_formula(inputs: Any, run: Any) -> None:
    case = PKLCase(inputs, run)
    for chunk in case.student:
        plain = case.literal(chunk, epsilon=0) + case.unreached(chunk)
        assert float(case.literal(chunk).detach()) == pytest.approx(float(plain.detach()), abs=THROUGH_W)


@pytest.mark.parametrize(("inputs", "run"), runs("nemo_pkl_*.json"))
def test_pkl_in_float32(inputs: Any, run: Any, make_view: Any) -> None:
    case = PKLCase(inputs, run, torch.float32)
    terms = [float((kl + case.unreached(chunk)).detach()) for chunk, kl in case.ours(make_view).items()]
    value = run["temperature"] ** 2 * sum(terms) / max(1, len(terms))
    assert value == pytest.approx(run["loss_f32"], rel=FLOAT32)


def hkl_terms(inputs: Any, run: Any, z: Tensor, make_view: Any) -> Tensor:
    """Our H-KL of each valid chunk. The published L1 stops at the end of the shorter list; so do ours at that rank."""
    valid = np.array(run["valid_chunk"])
    student, teacher = spans(inputs["student_chunk_id"], valid), spans(inputs["teacher_chunk_id"], valid)
    size = z.shape[1], len(run["common_teacher"]) + len(run["uncommon_teacher"])
    rows = flat_logits(inputs["teacher_logits"], z.dtype)[:, : size[1]] / run["temperature"]
    logp = torch.log_softmax(rows, -1)
    merged = [logp[teacher[chunk]].mean(0) for chunk in student]
    ranks = min(len(run["uncommon_student"]), len(run["uncommon_teacher"]), run["uncommon_topk"])
    s, t = np.array(run["common_student"], np.int32), np.array(run["common_teacher"], np.int32)
    flags = np.ones(len(s), np.bool_)
    w = ProjectionArrays(s, t, np.ones(len(s), np.float32), flags, flags)
    options = {"uncommon_topk": ranks} if ranks else {"uld_weight": 0.0}
    loss = open_loss("h-kl", setup_of(w, size, run, **options))
    columns = {
        "hkl_common_count": np.full(len(merged), len(s)),
        "hkl_common_ids": np.tile(s, len(merged)),
        "hkl_common_logprob": torch.cat([row[t.tolist()] for row in merged]),
        "hkl_other_count": np.full(len(merged), len(run["uncommon_teacher"])),
        "hkl_other_logprob": torch.cat([row[run["uncommon_teacher"]].sort(descending=True).values for row in merged]),
    }
    positions = list(student.values())
    view = make_view(z, [p[0] for p in positions], [len(p) for p in positions], columns, loss.temperature)
    return loss.terms(view)


@pytest.mark.parametrize(("inputs", "run"), runs("nemo_hkl_*.json"))
def test_hkl(inputs: Any, run: Any, make_view: Any) -> None:
    z = flat_logits(inputs["student_logits"]).requires_grad_()
    if not np.array(run["valid_chunk"]).any():
        assert run["loss_f64"] == 0  # nothing to show to a loss
        return
    terms = hkl_terms(inputs, run, z, make_view)
    published = np.array(run["per_chunk_kl_common"]) + np.array(run.get("per_chunk_l1_uncommon", 0.0))
    expected = [published[chunk] for chunk in spans(inputs["student_chunk_id"], np.array(run["valid_chunk"]))]
    assert terms.tolist() == pytest.approx(expected, rel=PRINTED, abs=PRINTED)
    assert_equals(run, run["temperature"] ** 2 * terms.mean(), z, PRINTED)


@pytest.mark.parametrize(("inputs", "run"), runs("nemo_hkl_*.json"))
def test_hkl_in_float32(inputs: Any, run: Any, make_view: Any) -> None:
    if np.array(run["valid_chunk"]).any():
        terms = hkl_terms(inputs, run, flat_logits(inputs["student_logits"], torch.float32), make_view)
        assert float(run["temperature"] ** 2 * terms.mean()) == pytest.approx(run["loss_f32"], rel=FLOAT32)


def direct_terms(inputs: Any, run: Any, z: Tensor, make_view: Any) -> Tensor:
    """Our sparse KL at every position, over the kept columns without REST."""
    top = np.array(run["global_top_indices"])
    rows = flat_logits(inputs["teacher_logits"], z.dtype)[:, : z.shape[1]] / run["temperature"]
    none = np.zeros(0, np.int32)
    w = ProjectionArrays(none, none, np.zeros(0, np.float32), np.zeros(0, np.bool_), np.zeros(0, np.bool_))
    loss = open_loss("sparse-kl", setup_of(w, (z.shape[1], z.shape[1]), run, rest="drop"))
    columns = {
        "skl_count": np.full(len(z), len(top)),
        "skl_ids": np.tile(top, len(z)),
        "skl_logprob": torch.log_softmax(rows, -1)[:, top].flatten(),
        "skl_rest_logprob": np.full(len(z), np.nan),
    }
    return loss.terms(make_view(z, range(len(z)), columns=columns, tau=loss.temperature))


@pytest.mark.parametrize(("inputs", "run"), runs("nemo_direct_topk_*.json"))
def test_sparse_kl(inputs: Any, run: Any, make_view: Any) -> None:
    z = flat_logits(inputs["student_logits"]).requires_grad_()
    terms = direct_terms(inputs, run, z, make_view)
    assert terms.tolist() == pytest.approx(np.array(run["per_position_kl"]).flatten(), rel=PRINTED, abs=PRINTED)
    mask = torch.tensor(inputs["predicting_position_mask"], dtype=terms.dtype).flatten()
    loss = run["temperature"] ** 2 * (terms * mask).sum() / (inputs["global_valid_toks"] + 1e-8)
    assert_equals(run, loss, z, PRINTED)


@pytest.mark.parametrize(("inputs", "run"), runs("nemo_direct_topk_*.json"))
def test_sparse_kl_in_float32(inputs: Any, run: Any, make_view: Any) -> None:
    terms = direct_terms(inputs, run, flat_logits(inputs["student_logits"], torch.float32), make_view)
    mask = torch.tensor(inputs["predicting_position_mask"], dtype=terms.dtype).flatten()
    value = run["temperature"] ** 2 * float((terms * mask).sum()) / (inputs["global_valid_toks"] + 1e-8)
    assert value == pytest.approx(run["loss_f32"], rel=FLOAT32, abs=1e-6)  # vocab_topk 1 is 0 up to rounding


def derived(inputs: Any, run: Any) -> Any:
    """A run of ``nemo_total_*`` with what other files say of theirs: valid chunks, kept columns, pairs of tokens."""
    sides = [np.array(inputs[f"{side}_chunk_id"]) for side in ("student", "teacher")]
    valid = np.array(inputs["pair_valid"]) & (np.array(inputs["sample_mask"])[:, None] != 0)
    for b, chunk in np.argwhere(valid):
        valid[b, chunk] = all((side[b] == chunk).any() for side in sides)
    W_VU = np.array(inputs["W"])
    highest_U = np.array(inputs["teacher_logits"])[..., : W_VU.shape[1]].max((0, 1))
    top = np.sort(np.argsort(-highest_U, kind="stable")[: run["vocab_topk"]])
    pairs = token_pairs(inputs, relaxed=run["xtoken_loss"])
    found = {"valid_chunk": valid.tolist(), "global_top_indices": top.tolist(), "uncommon_topk": 8192}
    found |= {"common_student": sorted(pairs), "common_teacher": [pairs[s] for s in sorted(pairs)]}
    for side, size, common in (("student", W_VU.shape[0], pairs.keys()), ("teacher", W_VU.shape[1], pairs.values())):
        found[f"uncommon_{side}"] = [token for token in range(size) if token not in common]
    return run | found


def token_pairs(inputs: Any, relaxed: bool) -> dict[int, int]:
    """Student id -> teacher id by each row's largest weight: of 1 and alone, or of .6 and more; the heaviest wins."""
    best: dict[int, tuple[float, int]] = {}
    for s, (ids, weights) in enumerate(zip(inputs["proj_indices"], inputs["proj_likelihoods"], strict=True)):
        slot = int(np.argmax(weights))
        if weights[slot] >= 0.6 if relaxed else (weights[slot] == 1 and ids[1] == -1):
            best[ids[slot]] = min(best.get(ids[slot], (0.0, s)), (-weights[slot], s))
    return {s: teacher for teacher, (_, s) in best.items()}


def total_parts(inputs: Any, run: Any, make_view: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Our KD and CE of a whole step, and the logits."""
    case = PKLCase(inputs, run)
    if run["gold_loss"]:
        terms = hkl_terms(inputs, run, case.z, make_view)
    else:
        terms = torch.stack([kl + case.unreached(chunk) for chunk, kl in case.ours(make_view).items()])
    shape = np.array(inputs["token_mask"]).shape
    mask = np.array(inputs["token_mask"]) * np.array(inputs["sample_mask"])[:, None]
    predicting = np.flatnonzero(np.pad(mask[:, 1:], ((0, 0), (0, 1))))
    labels = np.pad(np.array(inputs["student_input_ids"])[:, 1:], ((0, 0), (0, 1))).reshape(shape[0] * shape[1])
    logp = torch.log_softmax(case.z[predicting], -1)
    ce = cross_entropy(logp, torch.from_numpy(labels[predicting])) / len(predicting)
    assert len(predicting) == inputs["global_valid_toks"]
    return run["temperature"] ** 2 * terms.mean(), ce, case.z


@pytest.mark.parametrize(("inputs", "run"), runs("nemo_total_*.json"))
def test_the_whole_loss(inputs: Any, run: Any, make_view: Any) -> None:
    """KD, CE, the scale of dynamic mixing, their sum and its gradient, all of our own code."""
    kd, ce, z = total_parts(inputs, derived(inputs, run), make_view)
    assert float(kd.detach()) == pytest.approx(run["kd_loss"], rel=THROUGH_W)
    assert float(ce.detach()) == pytest.approx(run["ce_loss"], rel=PRINTED)
    mode = "dynamic" if run["dynamic_loss_scaling"] else "fixed"
    mixing = Mixing(mode, run["kl_loss_weight"], run["ce_loss_scale"])
    kd_weight, ce_weight = mixing.weights(float(kd.detach()), float(ce.detach()))
    if run["dynamic_loss_scaling"]:
        assert (kd_weight, ce_weight) == (pytest.approx(run["kl_loss_scale"], rel=THROUGH_W), 1.0)
    assert_equals(run, kd_weight * kd + ce_weight * ce, z, THROUGH_W)


def test_the_files_are_there() -> None:
    """A glob that finds nothing would test nothing."""
    for pattern, files in [("nemo_pkl_*", 4), ("nemo_hkl_*", 7), ("nemo_direct_topk_*", 4), ("nemo_total_*", 1)]:
        assert len(list(GOLDEN.glob(pattern))) >= files
