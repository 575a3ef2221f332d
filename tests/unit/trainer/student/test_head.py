"""Heads of many families are told apart from their models, and packing is used only where it changes nothing."""

from typing import Any

import pytest
import torch

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.student.head import find_head, packing_changes_nothing, pick_packing

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# family, options beside SMALL, scale and cap of the head
FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "llama": ({}, 1.0, None),
    "qwen3": ({"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, 1.0, None),
    "gemma2": ({}, 1.0, 30.0),
    "gemma3_text": ({"sliding_window": 4}, 1.0, None),
    "cohere": ({}, 0.0625, None),
    "granite": ({"logits_scaling": 8.0}, 0.125, None),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, 1.0, None),
}


def model_of(family: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family][0], **options})).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_head_give_the_models_logits(family: str) -> None:
    model = model_of(family)
    head, (_, scale, softcap) = find_head(model), FAMILIES[family]
    assert head.fusable
    assert (head.scale, head.softcap) == (scale, softcap)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        states = head.states(ids, torch.arange(9)[None])
        ours = head.logits(states, head.weight_MH, head.bias_M)
        torch.testing.assert_close(ours, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert packing_changes_nothing(head)


def test_another_formula_keeps_the_models_own_logits() -> None:
    """A head that does more than the known formulas is not fused, and still right."""
    model = model_of("llama")
    plain = model.forward
    model.forward = lambda *args, **options: _squared(plain(*args, **options))
    head = find_head(model)
    assert not head.fusable
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        logits = head.states(ids, torch.arange(5)[None])
        torch.testing.assert_close(head.logits(logits, head.weight_MH, head.bias_M), model(input_ids=ids).logits)


def _squared(found: Any) -> Any:
    found.logits = found.logits**2
    return found


def test_a_model_that_would_mix_samples_is_padded() -> None:
    """Position ids that a model ignores cannot keep samples apart."""
    model = model_of("llama")
    base = model.model.forward

    def deaf(*args: Any, position_ids: Any = None, **options: Any) -> Any:
        return base(*args, **options)

    model.model.forward = deaf
    head = find_head(model)
    assert head.positions
    assert not packing_changes_nothing(head)
    assert not pick_packing(head, "auto", "student")
    with pytest.raises(XtokenError, match=r"--batching pack: samples of one row would see each other in student.*pad"):
        pick_packing(head, "pack", "student")


def test_a_model_without_position_ids_is_padded() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "state_size": 4}
    head = find_head(auto.from_config(AutoConfig.for_model("mamba", **sizes)))
    assert head.fusable
    assert not head.positions
    assert not pick_packing(head, "auto", "mamba")


def test_padding_can_be_asked_for() -> None:
    assert not pick_packing(find_head(model_of("llama")), "pad", "student")


def test_probes_leave_the_model_as_it_was() -> None:
    model = model_of("llama").train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    packing_changes_nothing(find_head(model))
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
