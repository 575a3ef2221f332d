"""LoRA: nothing changes at the start, only adapters learn, and merging gives what was trained."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.student.adapters import add_adapters, merged, require_adapters, save_adapter
from xtoken.trainer.student.model import load_student, prepare, save_student

CPU = torch.device("cpu")
FAMILIES = ("untied", "tied", "gemma3", "gpt2", "mamba")
# W + BA in one product or in two: float32 sums in another order.
MERGED_WITHIN = 1e-5
# Adding zero changes no value, but the memory layout that Mamba's scan sees, and so the order of its sums.
STARTS_WITHIN = {"mamba": 1e-6}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def trained(model: Any, ids: torch.Tensor) -> Any:
    """``model`` after a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_learn_and_merging_is_exact(
    scratch: Callable[..., Any], family: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    """The saved model and peft's own reading of the saved adapter both give the adapted model's logits."""
    from peft import PeftModel

    plain = scratch(family)
    before, start = {n: p.clone() for n, p in plain.state_dict().items()}, logits(plain, ids)
    model = add_adapters(plain, rank=4, alpha=8.0)
    assert model is plain
    torch.testing.assert_close(logits(model, ids), start, atol=STARTS_WITHIN.get(family, 0), rtol=0)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning
    assert all(".lora_" in name for name in learning)
    assert ".lora_" not in " ".join(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    end = logits(trained(model, ids), ids)
    assert (end - start).abs().max() > 0.01
    state = merged(model)
    assert state.keys() == before.keys()
    save_student(model, "bytes", tmp_path / "model", state)
    loaded = load_student(str(tmp_path / "model"), CPU, False)
    torch.testing.assert_close(logits(loaded, ids), end, atol=MERGED_WITHIN, rtol=0)
    assert torch.equal(logits(model, ids), end), "merging leaves the model as it is"
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(scratch(family), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs, ids), end, atol=MERGED_WITHIN, rtol=0)
    assert torch.equal(before["lm_head.weight"], state["lm_head.weight"])


@pytest.mark.parametrize("family", ["untied", "tied", "gemma3", "gpt2"])
def test_embedding_and_head_in_full_stay_tied_if_they_were(
    scratch: Callable[..., Any], family: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    """One storage before training, after it, after the save and in the merged model; peft reads the same model."""
    from peft import PeftModel

    plain = scratch(family)
    tied = family != "untied"
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model = add_adapters(plain, rank=2, embeddings=True)
    table = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert len(table) == (1 if tied else 2)
    end = logits(trained(model, ids), ids)
    for one in (model, load_again(model, tmp_path / "model")):
        embedding, head = one.get_input_embeddings().weight, one.get_output_embeddings().weight
        assert (embedding is head) == (embedding.data_ptr() == head.data_ptr()) == tied
        torch.testing.assert_close(logits(one, ids), end, atol=MERGED_WITHIN, rtol=0)
    state = merged(model)
    changed = {name for name in before if not torch.equal(before[name], state[name])}
    assert table <= changed
    assert not {name for name in changed - table if "embed" in name or "norm" in name or "ln_" in name}
    save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(scratch(family), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs, ids), end, atol=MERGED_WITHIN, rtol=0)


def load_again(model: Any, folder: Path) -> Any:
    save_student(model, "bytes", folder, merged(model))
    return load_student(str(folder), CPU, False)


def test_merging_is_what_peft_does(scratch: Callable[..., Any], ids: torch.Tensor) -> None:
    from peft.tuners.lora import LoraLayer

    model = trained(add_adapters(scratch("gpt2"), rank=4), ids)
    ours = merged(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        layer.merge()  # type: ignore[operator]
        torch.testing.assert_close(ours[f"{name}.weight"], layer.base_layer.weight.data)


def test_a_whole_state_serves_a_sharded_model(scratch: Callable[..., Any], ids: torch.Tensor) -> None:
    """Weights of the state given are merged, not those the model happens to hold."""
    model = trained(add_adapters(scratch("untied"), rank=2), ids)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = {name: value.clone() for name, value in merged(model).items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    found = merged(model, state)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_seed_and_alpha(scratch: Callable[..., Any]) -> None:
    before = torch.get_rng_state()
    one, same, other = (add_adapters(scratch("untied"), 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert one.peft_config["default"].lora_alpha == 4, "twice the rank"


def test_recomputed_activations_reach_the_adapters(scratch: Callable[..., Any], ids: torch.Tensor) -> None:
    """No input requires a gradient here, which the older way of recomputing cannot do."""
    grads = []
    for recompute in (False, True):
        model = prepare(add_adapters(scratch("untied"), 4), recompute, compile=False)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert any(grad.any() for grad in grads[0])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_missing_peft_is_said(scratch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(XtokenError, match=r"pip install 'xtoken\[lora\]'"):
        require_adapters()
    with pytest.raises(XtokenError, match=r"pip install 'xtoken\[lora\]'"):
        add_adapters(scratch("untied"), 4)


def test_a_model_without_linear_layers_is_refused() -> None:
    class Nothing(torch.nn.Module):
        config = type("Config", (), {"model_type": "nothing"})()

        def prepare_inputs_for_generation(self) -> None: ...

    with pytest.raises(XtokenError, match="peft cannot adapt Nothing"):
        add_adapters(Nothing(), 4)


def test_the_random_state_of_other_devices_is_not_touched(
    scratch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Where there are several GPUs, each rank would otherwise open all of them, with a warning."""
    model, real, asked = scratch("untied"), torch.random.fork_rng, list[Any]()

    def fork(*args: Any, **options: Any) -> Any:
        asked.append(options["devices"])
        return real(*args, **options)

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    before = torch.get_rng_state()
    add_adapters(model, 2, seed=1)
    assert asked == [[]]
    assert torch.equal(torch.get_rng_state(), before)
    assert not [one for one in recwarn if "fork_rng" in str(one.message)]
