"""Mixing of KD and CE against NeMo-RL's whole loss (``tests/golden/README.md``)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from xtoken.trainer.mixing import Mixing

GOLDEN = Path(__file__).parents[2] / "golden"
TOTAL = json.loads((GOLDEN / "nemo_total_01.json").read_text())
PRINTED = 1e-7  # the files hold nine digits


def mixing_of(run: Any) -> Mixing:
    mode = "dynamic" if run["dynamic_loss_scaling"] else "fixed"
    return Mixing(mode, run.get("kl_loss_weight", 1.0), run.get("ce_loss_scale", 1.0))


def cross_entropy(inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token CE over the label mask and its gradient by the logits, by autograd."""
    z = torch.tensor(inputs["student_logits"], dtype=torch.float64, requires_grad=True)
    label, mask = torch.tensor(inputs["student_input_ids"]), torch.tensor(inputs["token_mask"], dtype=torch.float64)
    mask = mask * torch.tensor(inputs["sample_mask"], dtype=torch.float64)[:, None]
    logp = z.log_softmax(-1)[:, :-1].gather(2, label[:, 1:, None])[..., 0]
    ce = -(logp * mask[:, 1:]).sum() / (inputs["global_valid_toks"] + 1e-8)
    return ce.detach(), torch.autograd.grad(ce, z)[0]


@pytest.mark.parametrize("run", TOTAL["runs"], ids=range(len(TOTAL["runs"])))
def test_the_objective_is_the_published_one(run: Any) -> None:
    ce, _ = cross_entropy(TOTAL["inputs"])
    assert float(ce) == pytest.approx(run["ce_loss"], rel=PRINTED)
    kd_weight, ce_weight = mixing_of(run).weights(run["kd_loss"], run["ce_loss"])
    assert kd_weight * run["kd_loss"] + ce_weight * run["ce_loss"] == pytest.approx(run["loss_f64"], rel=PRINTED)
    if run["dynamic_loss_scaling"]:
        assert kd_weight == pytest.approx(run["kl_loss_scale"], rel=PRINTED)


def test_the_gradient_is_the_published_one() -> None:
    """nemo_pkl_03 has the same inputs: its gradient of KD and ours of CE, weighed, are the gradient of the whole."""
    parts = json.loads((GOLDEN / "nemo_pkl_03.json").read_text())
    assert parts["inputs"]["student_logits"] == TOTAL["inputs"]["student_logits"]
    keys = ("temperature", "vocab_topk", "reverse_kl")
    _, ce_grad = cross_entropy(TOTAL["inputs"])
    compared = 0
    for run in TOTAL["runs"]:
        same = [one for one in parts["runs"] if all(one[key] == run[key] for key in keys)]
        if same and not run["gold_loss"]:
            kd_weight, ce_weight = mixing_of(run).weights(run["kd_loss"], run["ce_loss"])
            kd_grad = torch.tensor(same[0]["grad_student_logits"], dtype=torch.float64)
            expected = torch.tensor(run["grad_student_logits"], dtype=torch.float64)
            torch.testing.assert_close(kd_weight * kd_grad + ce_weight * ce_grad, expected, rtol=PRINTED, atol=1e-8)
            compared += 1
    assert compared == 1


def test_without_kd_the_objective_is_ce() -> None:
    assert Mixing("dynamic", 5.0, 5.0).weights(0.0, 2.0) == (1.0, 1.0)
    assert Mixing("dynamic", 5.0, 5.0).weights(-0.5, 2.0) == (4.0, 1.0)
