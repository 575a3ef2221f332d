"""A log-softmax whose readers leave their gradients with it, against torch's log-softmax and autograd.

Whole blocks with every loss: tests/unit/trainer/test_block_gradients.py.
"""

import pytest
import torch
from torch import Tensor

from xtoken.trainer.losses.divergence import kept_and_tail
from xtoken.trainer.losses.log_softmax import log_softmax, picked, rows_at, sink_of
from xtoken.trainer.losses.token_set import set_mass


def test_another_reader_is_added() -> None:
    """What goes through an operation of torch comes by autograd, on top of what was left."""
    z_PV = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    place_E, row_C, member_V = torch.tensor([3, 3, 40]), torch.tensor([4, 1]), torch.tensor([0.0, 1, 1] * 3).double()

    def total(logp_PV: Tensor) -> Tensor:
        rows = rows_at(logp_PV, row_C).square().sum() + rows_at(logp_PV, torch.arange(5)).sin().sum()
        mass = set_mass(logp_PV, member_V, place_E, ranks=2)
        logp_E, tail_P = kept_and_tail(logp_PV, place_E, torch.tensor([3, 40]), torch.tensor([0.25, 0.5]).double())
        parts = [picked(logp_PV, place_E), mass.mass_P, mass.top_PR, mass.logp_E, logp_E, tail_P, logp_PV * 3]
        return rows + sum(((2 + i) * part.cos()).sum() for i, part in enumerate(parts))

    (expected,) = torch.autograd.grad(total(torch.log_softmax(z_PV, -1)), z_PV)
    found = [torch.autograd.grad(total(log_softmax(z_PV, again=again)), z_PV)[0] for again in (False, True)]
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-13)


def test_the_tail_keeps_its_digits_where_it_is_tiny() -> None:
    """A row with all but 1e-20 of its mass in the kept cells: the pull on the rest is exact, not a difference."""
    z_PV = torch.full((1, 6), -46.0)
    z_PV[0, :2] = torch.tensor([0.0, 0.5])
    z_PV.requires_grad_()
    place_M = torch.tensor([0, 1])
    _, tail_P = kept_and_tail(log_softmax(z_PV), place_M, place_M, torch.full((2,), 1e-26))
    (grad_PV,) = torch.autograd.grad(tail_P.sum(), z_PV)
    exact = z_PV.detach().double().requires_grad_()
    share_V = torch.tensor([1e-26, 1e-26, 1, 1, 1, 1]).double()
    (exact_PV,) = torch.autograd.grad((exact.softmax(-1) * share_V).sum().log(), exact)
    torch.testing.assert_close(grad_PV.double(), exact_PV, rtol=1e-5, atol=0)


def test_a_second_backward_pass_is_refused_unless_it_was_announced() -> None:
    z_PV = torch.randn(3, 5, requires_grad=True)
    value = picked(log_softmax(z_PV), torch.tensor([2])).sum()
    torch.autograd.grad(value, z_PV, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, z_PV)
    value = picked(log_softmax(z_PV, again=True), torch.tensor([2])).sum()
    one, other = (torch.autograd.grad(value, z_PV, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, other)


def test_only_what_it_made_itself_has_a_sink() -> None:
    logp_PV = log_softmax(torch.randn(3, 5, requires_grad=True))
    assert sink_of(logp_PV) is not None
    others = [logp_PV.detach(), logp_PV * 2, logp_PV[:2], rows_at(logp_PV, torch.arange(2)), logp_PV.log_softmax(-1)]
    assert not any(map(sink_of, others))
