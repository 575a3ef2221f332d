"""Cross-entropy against its reference, and the list of losses."""

from typing import Any

import numpy as np
import pytest
import torch

from xtoken.schemas.losses import LOSSES
from xtoken.schemas.tables import targets
from xtoken.trainer.losses import open_loss, reference
from xtoken.trainer.losses.ce import cross_entropy

EXACT = 1e-12  # float64, five terms


def test_ce_equals_its_reference() -> None:
    z = torch.tensor(np.random.default_rng(3).normal(0, 2, (5, 11)), requires_grad=True)
    labels = torch.tensor([0, 10, 3, 3, 7])
    fast = cross_entropy(z.log_softmax(-1), labels)
    slow = torch.stack([reference.cross_entropy(p, int(t)) for p, t in zip(z.softmax(-1), labels, strict=True)]).sum()
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), rel=EXACT)
    (ours,), (theirs,) = torch.autograd.grad(fast, z), torch.autograd.grad(slow, z)
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


def test_ce_alone_has_no_chunks(pair: Any, make_view: Any) -> None:
    terms = open_loss("ce", pair.setup()).terms(make_view(torch.zeros(2, 24), []))
    assert terms.shape == (0,)


def test_every_stored_loss_opens_and_reads_its_own_columns(pair: Any) -> None:
    for name in LOSSES:
        loss = open_loss(name, pair.setup())
        assert set(loss.columns.names) <= set(targets([name]).names), name
        assert (name == "ce") == (not loss.columns.names)
        assert loss.parameters() == []
