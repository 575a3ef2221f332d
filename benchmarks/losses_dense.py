"""The dense side of the loss benchmark: what an online trainer computes that has whole rows of both models.

Plain torch and autograd on all positions at once. The student goes through all of W (sparse, CSR) into the teacher's
vocabulary, sorted losses sort both sides whole, byte-prefix moves all of the teacher's row into the student's
vocabulary. Maps that depend on the vocabularies or the text alone are made beforehand and not timed.

Shapes: P positions, V student vocabulary, C chunks, R teacher rows, U teacher vocabulary, J teacher tokens of chunks
after their first, E student tokens of chunks after their first, M matched pairs, G groups.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.align.prefix import PrefixMaps, first_tokens
from xtoken.pipeline.project.projection import Projection
from xtoken.pipeline.store.reader import iter_capture, load_vocab
from xtoken.pipeline.tokens import TokenTable, load_tokenizer
from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.data.micro_batch import Micro
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses.alm import binary_kl

OPTIONS = LossOptions()
EPS = 1e-6


@dataclass(frozen=True)
class Dense:
    """What the dense losses are given; see the module for shapes.

    Attributes:
        label_P: realised student tokens; first_C, length_C: positions of the chunks.
        teacher_RU: logits; target_R: realised teacher tokens; row_C, count_C: rows of the chunks.
        wt_UV: W transposed, CSR.
        unreached, moved_to: teacher ids outside W that have a prefix, and where their mass goes.
        common, exact: student and teacher ids of H-KL's pairs and of those of equal bytes.
    """

    label_P: Tensor
    first_C: Tensor
    length_C: Tensor
    teacher_RU: Tensor
    target_R: Tensor
    row_C: Tensor
    count_C: Tensor
    wt_UV: Tensor
    unreached: Tensor
    moved_to: Tensor
    common: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor]
    prefix: "Prefix | None" = None

    def teacher_logp(self) -> tuple[Tensor, Tensor]:
        """[C, U] log-probabilities of the chunks' first rows, and [R] those of the realised tokens."""
        lse_R = self.teacher_RU.logsumexp(dim=-1)
        realised_R = self.teacher_RU.gather(1, self.target_R[:, None])[:, 0] - lse_R
        return self.teacher_RU[self.row_C] - lse_R[self.row_C, None], realised_R


@dataclass(frozen=True)
class Prefix:
    """Maps of byte-prefix.

    Attributes:
        phi_U: student token of each teacher token, V where none is.
        interior: per position inside a teacher token: position, row, teacher ids that go on, their student tokens.
        order: student text tokens in order of bytes.
        alone, group: teacher tokens without a twin, and the group of each among all of them.
        child: position, chunk, group and range of every group that a chunk's first student token begins.
    """

    phi_U: Tensor
    interior: list[tuple[int, int, Tensor, Tensor]]
    order: Tensor
    alone: Tensor
    group: Tensor
    groups: int
    child: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def load_dense(folder: Path, name: str, micro: Micro) -> Dense:
    """Maps and rows for the loss ``name``, from what ``losses_inputs.prepare`` wrote."""
    targets = Targets(str(folder / "targets"))
    group = targets.read(targets.groups[0], ("chunk_student_end", "chunk_teacher_end"))
    held = micro.targets[0]
    ends = [group.values(key, 0).astype(np.int64) for key in ("chunk_student_end", "chunk_teacher_end")]
    starts = [np.concatenate([[0], end[:-1]]) for end in ends]
    # the student sees BOS first, the teacher does not: its row r predicts token r + 1
    used_C = (starts[1] >= 1) & (ends[0] <= len(micro.label_P))
    if len(held.first_C):
        assert (starts[0][used_C] == held.first_C).all()
    teacher = load_vocab(str(folder / "capture"))
    ids = _teacher_ids(folder)
    w, (student_ids, teacher_ids) = targets.w, _pairs(targets)
    size = (teacher.size, len(targets.vocab.space_V))
    wt = torch.sparse_coo_tensor(torch.tensor(np.stack([w.teacher_id, w.student_id])), torch.tensor(w.weight), size)
    unreached, moved_to = _unreached(folder)
    first_C, length_C, row_C, count_C = (
        torch.from_numpy(value[used_C])
        for value in (starts[0], ends[0] - starts[0], starts[1] - 1, ends[1] - starts[1])
    )
    dense = Dense(
        label_P=torch.from_numpy(micro.label_P),
        first_C=first_C,
        length_C=length_C,
        teacher_RU=torch.from_numpy(np.load(folder / "teacher.npy")),
        target_R=torch.from_numpy(ids[1:]),
        row_C=row_C,
        count_C=count_C,
        wt_UV=wt.coalesce().to_sparse_csr(),
        unreached=unreached,
        moved_to=moved_to,
        common=(student_ids[w.common], teacher_ids[w.common]),
        exact=(student_ids[w.exact], teacher_ids[w.exact]),
    )
    if name != "byte-prefix":
        return dense
    return Dense(**{**vars(dense), "prefix": _prefix(folder, targets, teacher, dense)})


def _pairs(targets: Targets) -> tuple[Tensor, Tensor]:
    return torch.tensor(targets.w.student_id).long(), torch.tensor(targets.w.teacher_id).long()


def _teacher_ids(folder: Path) -> NDArray[Any]:
    (batch,) = iter_capture(str(folder / "capture"), ["teacher_ids"])
    return np.array(batch["teacher_ids"][0].as_py(), np.int64)


def _unreached(folder: Path) -> tuple[Tensor, Tensor]:
    table = pq.read_table(folder / "targets" / "unreached.parquet").drop_null()
    return tuple(torch.tensor(table[name].to_numpy()).long() for name in ("teacher_id", "moved_to"))  # type: ignore[return-value]


def _prefix(folder: Path, targets: Targets, teacher: TokenTable, dense: Dense) -> Prefix:
    tokenizer = load_tokenizer(str(folder.parent / "tokenizer.json"))
    student, phi_B = tokenizer.table, first_tokens(teacher, tokenizer)
    w, unreached = (pq.read_table(folder / "targets" / f"{name}.parquet") for name in ("w", "unreached"))
    maps = PrefixMaps.of(student, teacher, Projection.from_tables(w, unreached, student.info, teacher.info), phi_B)
    first_U = np.where(teacher.lengths > 0, maps.phi_B[np.minimum(teacher.offsets[:-1], len(maps.phi_B) - 1)], -1)
    target_U = np.where(maps.role_U >= 0, maps.role_U, first_U)
    phi_U = torch.from_numpy(np.where(target_U < 0, student.size, target_U).astype(np.int64))
    alone, group, spelled = _groups(teacher, maps.alone_U)
    order = torch.from_numpy(targets.vocab.order.astype(np.int64))
    child = _children(student, targets.vocab.order, spelled, dense)
    return Prefix(phi_U, _interior(student, teacher, maps, dense), order, alone, group, len(spelled), child)


def _groups(teacher: TokenTable, alone_U: NDArray[Any]) -> tuple[Tensor, Tensor, list[bytes]]:
    """Teacher tokens without a twin in order of bytes, the group of each, and each group's shortest bytes."""
    pieces = teacher.pieces()
    alone = sorted(np.flatnonzero(alone_U).tolist(), key=pieces.__getitem__)
    shortest: list[bytes] = []
    group = []
    for token in alone:
        if not shortest or not pieces[token].startswith(shortest[-1]):
            shortest.append(pieces[token])
        group.append(len(shortest) - 1)
    return torch.tensor(alone), torch.tensor(group), shortest


def _children(
    student: TokenTable, order: NDArray[Any], spelled: list[bytes], dense: Dense
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every group whose bytes a chunk's first student token begins, with the range of what comes next."""
    pieces = student.pieces()
    ordered = [pieces[i] for i in order.tolist()]
    found: list[tuple[int, int, int, int, int]] = []
    for chunk, first in enumerate(dense.first_C.tolist()):
        begun = pieces[int(dense.label_P[first])]
        if not begun or first + 1 >= len(dense.label_P):
            continue
        for group in range(*_prefix_range(spelled, begun)):
            rest = spelled[group][len(begun) :]
            low, high = _prefix_range(ordered, rest) if rest else (0, 0)
            if low < high:
                found.append((first + 1, chunk, group, low, high))
    columns = zip(*found, strict=True) if found else [()] * 5
    return tuple(torch.tensor(column, dtype=torch.int64) for column in columns)  # type: ignore[return-value]


def _prefix_range(ordered: list[bytes], start: bytes) -> tuple[int, int]:
    """The sorted entries that start with these bytes."""
    low = bisect_left(ordered, start)
    high = low
    while high < len(ordered) and ordered[high].startswith(start):
        high += 1
    return low, high


def _interior(
    student: TokenTable, teacher: TokenTable, maps: PrefixMaps, dense: Dense
) -> list[tuple[int, int, Tensor, Tensor]]:
    pieces, spelled = teacher.pieces(), student.pieces()
    found = []
    for first, length, row, count in zip(
        *(t.tolist() for t in (dense.first_C, dense.length_C, dense.row_C, dense.count_C)), strict=True
    ):
        before = 0
        for position in range(first + 1, first + length):
            before += len(spelled[int(dense.label_P[position - 1])])
            at = row
            start = 0
            while at < row + count and start + len(pieces[int(dense.target_R[at])]) <= before:
                start += len(pieces[int(dense.target_R[at])])
                at += 1
            begun = pieces[int(dense.target_R[at])][: before - start]
            ids = [t for t, piece in enumerate(pieces) if len(piece) > len(begun) and piece.startswith(begun)]
            phi = maps.phi_B[teacher.offsets[ids] + len(begun)].astype(np.int64)
            found.append((position, at, torch.tensor(ids), torch.from_numpy(np.where(phi < 0, student.size, phi))))
    return found


def p_kl(dense: Dense, logp_PV: Tensor) -> Tensor:
    """KL of the teacher's whole rows, unreached mass moved, to the student through W."""
    student_VC = logp_PV[dense.first_C].exp().T
    q_CU: Tensor = torch.sparse.mm(dense.wt_UV, student_VC).T
    p_CU = dense.teacher_logp()[0].exp_()
    moved = p_CU[:, dense.unreached]
    p_CU.index_add_(1, dense.moved_to, moved)
    p_CU[:, dense.unreached] = 0
    return (torch.xlogy(p_CU, p_CU) - p_CU * q_CU.clamp(min=1e-30).log()).sum()


def h_kl(dense: Dense, logp_PV: Tensor) -> Tensor:
    """KL on the common pairs, and whole sorts of what is outside, both cut."""
    logp_CV, (logt_CU, _) = logp_PV[dense.first_C], dense.teacher_logp()
    s, t = dense.common
    logt_CM = logt_CU[:, t]
    common = (logt_CM.exp() * (logt_CM - logp_CV[:, s])).sum()
    return common + _sorted_l1(_outside(logp_CV, s).exp(), _outside(logt_CU, t).exp(), OPTIONS.uncommon_topk)


def gold(dense: Dense, logp_PV: Tensor) -> Tensor:
    """Generalised JSD on the pairs of equal bytes, whole sorts of the others; both times the later realised tokens."""
    logt_CU, realised_R = dense.teacher_logp()
    logt_CU = logt_CU + _later(realised_R, dense.row_C, dense.count_C)[:, None]
    logp_CV = logp_PV[dense.first_C] + _student_later(dense, logp_PV)[:, None]
    s, t = dense.exact
    p_CM, q_CM, beta = logp_CV[:, s].exp(), logt_CU[:, t].exp(), OPTIONS.beta
    m_CM = ((1 - beta) * p_CM + beta * q_CM).clamp(min=1e-30)
    jsd = beta * (torch.xlogy(q_CM, q_CM) - q_CM * m_CM.log())
    jsd = (jsd + (1 - beta) * p_CM * (p_CM.clamp(min=1e-30).log() - m_CM.log())).sum()
    weight = len(t) / dense.teacher_RU.shape[1]
    return weight * jsd + (1 - weight) * _sorted_l1(_outside(logp_CV, s).exp(), _outside(logt_CU, t).exp())


def uld(dense: Dense, logp_PV: Tensor) -> Tensor:
    """Sorted L1 over both vocabularies."""
    logt_CU, realised_R = dense.teacher_logp()
    logt_CU = logt_CU + _later(realised_R, dense.row_C, dense.count_C)[:, None]
    logp_CV = logp_PV[dense.first_C] + _student_later(dense, logp_PV)[:, None]
    return _sorted_l1(logp_CV.exp(), logt_CU.exp())


def alm(dense: Dense, logp_PV: Tensor) -> Tensor:
    """Chunk likelihoods from whole rows of both sides."""
    realised_R = dense.teacher_logp()[1]
    realised_P = logp_PV.gather(1, dense.label_P[:, None])[:, 0]
    a = realised_R[dense.row_C] + _later(realised_R, dense.row_C, dense.count_C)
    b = realised_P[dense.first_C] + _later(realised_P, dense.first_C, dense.length_C)
    return binary_kl(a / OPTIONS.alm_tau - EPS, b / OPTIONS.alm_tau - EPS).sum()


def byte_prefix(dense: Dense, logp_PV: Tensor) -> Tensor:
    """KL to the teacher's whole row moved into the student's vocabulary, at roots and inside tokens; child terms."""
    maps = dense.prefix
    assert maps is not None
    p_CU = dense.teacher_logp()[0].exp_()
    target_PV = p_CU.new_zeros(logp_PV.shape[0], logp_PV.shape[1] + 1)
    roots_CV = p_CU.new_zeros(len(p_CU), logp_PV.shape[1] + 1).index_add_(1, maps.phi_U, p_CU)
    target_PV[dense.first_C] = roots_CV
    for position, row, ids, phi in maps.interior:
        target_PV[position].index_add_(0, phi, torch.softmax(dense.teacher_RU[row, ids], dim=0))
    target_PV = target_PV[:, :-1]
    loss = (torch.xlogy(target_PV, target_PV) - target_PV * logp_PV).sum()
    position_G, chunk_G, group_G, low_G, high_G = maps.child
    mass_CG = p_CU.new_zeros(len(p_CU), maps.groups).index_add_(1, maps.group, p_CU[:, maps.alone])
    positions, which = torch.unique(position_G, return_inverse=True)
    up_to = logp_PV[positions][:, maps.order].exp().cumsum(dim=1)
    up_to = torch.nn.functional.pad(up_to, (1, 0))
    reached = (up_to[which, high_G] - up_to[which, low_G]).clamp(min=1e-30)
    return loss - (mass_CG[chunk_G, group_G] * reached.log()).sum()


def sparse_kl(dense: Dense, logp_PV: Tensor) -> Tensor:
    """KL of the teacher's whole rows in the same vocabulary."""
    logt_CU = dense.teacher_logp()[0]
    return (logt_CU.exp() * (logt_CU - logp_PV[dense.first_C])).sum()


TERMS: dict[str, Callable[[Dense, Tensor], Tensor]] = {
    "p-kl": p_kl,
    "h-kl": h_kl,
    "gold": gold,
    "uld": uld,
    "alm": alm,
    "byte-prefix": byte_prefix,
    "sparse-kl": sparse_kl,
}


def gradient(dense: Dense, name: str, logits_PV: Tensor, factors: tuple[float, float]) -> tuple[Tensor, float, float]:
    """Gradient [P, V] of factors[0] * CE + factors[1] * KD by the logits, and the sums CE and KD."""
    leaf = logits_PV.detach().requires_grad_()
    logp_PV = torch.log_softmax(leaf, dim=-1)
    ce = -logp_PV.gather(1, dense.label_P[:, None]).sum()
    kd = TERMS[name](dense, logp_PV) if name in TERMS else torch.zeros(())
    (grad_PV,) = torch.autograd.grad(factors[0] * ce + factors[1] * kd, leaf)
    return grad_PV, float(ce.detach()), float(kd.detach())


def _outside(x_CN: Tensor, inside: Tensor) -> Tensor:
    keep = torch.ones(x_CN.shape[1], dtype=torch.bool)
    keep[inside] = False
    return x_CN[:, torch.nonzero(keep).flatten()]


def _sorted_l1(student: Tensor, teacher: Tensor, cut: int | None = None) -> Tensor:
    """L1 of both sorted lists, the shorter one padded with zeros."""
    student = student.sort(dim=1, descending=True).values[:, :cut]
    teacher = teacher.sort(dim=1, descending=True).values[:, :cut]
    width = max(student.shape[1], teacher.shape[1])
    pad = torch.nn.functional.pad
    student, teacher = pad(student, (0, width - student.shape[1])), pad(teacher, (0, width - teacher.shape[1]))
    return (student - teacher).abs().sum()


def _later(value_N: Tensor, first_C: Tensor, length_C: Tensor) -> Tensor:
    """[C] sum of the values of each chunk after its first."""
    chunk_E = torch.repeat_interleave(torch.arange(len(first_C)), length_C - 1)
    before_C = (length_C - 1).cumsum(0) - (length_C - 1)
    place_E = torch.arange(len(chunk_E)) - before_C[chunk_E] + first_C[chunk_E] + 1
    return value_N.new_zeros(len(first_C)).index_add(0, chunk_E, value_N[place_E])


def _student_later(dense: Dense, logp_PV: Tensor) -> Tensor:
    realised_P = logp_PV.gather(1, dense.label_P[:, None])[:, 0]
    return _later(realised_P, dense.first_C, dense.length_C)
