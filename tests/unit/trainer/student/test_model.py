"""Students of several families: saved whole, usable by strangers, ready to train."""

import errno
import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError, named
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.student.model import (
    decoder_layers,
    head_width,
    load_student,
    open_student,
    prepare,
    save_student,
    straight_to,
)

CPU = torch.device("cpu")
FAMILIES = ("untied", "tied", "gemma3", "gpt2", "mamba")
TEXT = "Héllo\n\x00 wörld  日本\U0001f600<s>"
# Recomputed activations are the same numbers; only sums of gradients may be taken in another order.
RECOMPUTED_WITHIN = 1e-6
# A compiled layer fuses and reorders float32 arithmetic.
COMPILED_WITHIN = 1e-4


def gradients(model: Any, ids: torch.Tensor, used: int = 256) -> dict[str, torch.Tensor]:
    """Gradients of the cross-entropy over the first ``used`` columns."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1, :used]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_student_is_a_whole_folder(
    scratch: Callable[..., Any], family: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Loaded again by us and by transformers it gives the same logits, and generates with its own tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = scratch(family).eval()
    save_student(model, "bytes", tmp_path / "model")
    ours, theirs = (
        load_student(str(tmp_path / "model"), CPU, False),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
    )
    with torch.no_grad():
        logits = [one.eval()(input_ids=ids, use_cache=False).logits for one in (model, ours, theirs)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text_ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert text_ids[0].tolist() == list(TEXT.encode())
    assert tokenizer.decode(text_ids[0]) == TEXT
    drawn = theirs.generate(text_ids, max_new_tokens=8, do_sample=True, temperature=9.0, num_return_sequences=64)
    assert drawn.shape == (64, len(TEXT.encode()) + 8)
    assert int(drawn.max()) < 256, "columns that nothing trains are not drawn"


def test_the_bytes_tokenizer_on_disk_is_ours(scratch: Callable[..., Any], tmp_path: Path) -> None:
    """Its hash is that of 'bytes', so that a saved student fits targets that were aligned for 'bytes'."""
    from xtoken.pipeline.tokens import load_tokenizer

    save_student(scratch("tied"), "bytes", tmp_path / "model")
    ours, written = (load_tokenizer(source).table.info for source in ("bytes", str(tmp_path / "model")))
    assert written.hash == ours.hash
    assert "--tokenizer bytes" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_columns_get_no_gradient(scratch: Callable[..., Any], family: str, ids: torch.Tensor) -> None:
    model = scratch(family)
    gradients(model, ids)
    assert head_width(model) == 264
    head = model.get_output_embeddings().weight.grad
    assert not head[256:].any()
    assert head[:256].any()


def test_tokenizer_files_come_from_a_folder_or_a_file(
    scratch: Callable[..., Any], smollm2_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_bytes((smollm2_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text("not this one")
    for source, name in ((smollm2_dir, "a"), (other, "b")):
        save_student(scratch("tied"), str(source), tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").read_bytes() == other.read_bytes()
        assert not (tmp_path / name / "README.md").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gathered_state_is_saved(scratch: Callable[..., Any], family: str, tmp_path: Path) -> None:
    """What the ranks of a sharded model gather holds tied weights under one name only."""
    model = scratch(family)
    state = {name: value + 1 for name, value in model.named_parameters()}
    save_student(model, "bytes", tmp_path / "model", state)
    loaded = dict(load_student(str(tmp_path / "model"), CPU, False).named_parameters())
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_others_may_read_the_weights(scratch: Callable[..., Any], tmp_path: Path) -> None:
    """As far as they may read any file that is made here."""
    save_student(scratch("tied"), "bytes", tmp_path / "model")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (*(tmp_path / "model").iterdir(), tmp_path / "plain")}
    assert len(modes) == 1


def test_a_failed_save_leaves_the_old_folder(
    scratch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = scratch("tied"), tmp_path / "model"
    save_student(model, "bytes", out)
    before = (out / "model.safetensors").read_bytes()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("xtoken.trainer.student.model.copy_tokenizer", full)
    with pytest.raises(OSError, match="No space"):
        save_student(model, "bytes", out)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_disk_without_room_is_an_error_of_the_system(scratch: Callable[..., Any], tmp_path: Path) -> None:
    """safetensors has an error of its own for it, with the number in its text."""
    model, limits = scratch("tied"), resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
        with pytest.raises(OSError, match="File too large") as found:
            save_student(model, "bytes", tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, was)
    assert found.value.errno == errno.EFBIG
    assert "make room" in str(named(found.value))
    assert not (tmp_path / "model").exists(), "half a model is no model"


def test_published_generation_settings_do_not_stop_a_save(scratch: Callable[..., Any], tmp_path: Path) -> None:
    """A temperature without do_sample loads, but transformers refuses to write it."""
    model = scratch("tied")
    model.generation_config.temperature = 0.6
    save_student(model, "bytes", tmp_path / "model")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"]) == (0.6, True)


def test_a_folder_is_opened_in_float32(
    configure: Callable[..., TrainConfig],
    scratch: Callable[..., Any],
    bytes_info: TokenizerInfo,
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    """Stored in bfloat16, trained in float32."""
    save_student(scratch("gemma3").to(torch.bfloat16), "bytes", tmp_path / "stored")
    config = configure({}, from_scratch=None, student=str(tmp_path / "stored"))
    model = open_student(config.student, CPU, bytes_info, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(grad.isfinite().all() for grad in gradients(model, ids).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients(
    scratch: Callable[..., Any], family: str, ids: torch.Tensor
) -> None:
    plain, recomputed = scratch(family), prepare(scratch(family), activation_checkpointing=True, compile=False)
    expected, found = gradients(plain.train(), ids), gradients(recomputed, ids)
    assert recomputed.is_gradient_checkpointing
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= RECOMPUTED_WITHIN * grad.norm(), name


def test_layers_are_run_again_in_the_backward_pass(scratch: Callable[..., Any], ids: torch.Tensor) -> None:
    """The flag does something: each layer's attention runs twice."""
    calls = {False: 0, True: 0}
    for flag in calls:
        model = prepare(scratch("untied"), activation_checkpointing=flag, compile=False)
        hook = model.model.layers[0].self_attn.register_forward_hook(
            lambda *_, flag=flag: calls.__setitem__(flag, calls[flag] + 1)
        )
        gradients(model, ids)
        hook.remove()
    assert calls == {False: 1, True: 2}


def test_a_model_that_cannot_recompute_is_refused(scratch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = scratch("untied")
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(XtokenError, match="leave --activation-checkpointing out"):
        prepare(model, activation_checkpointing=True, compile=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found(scratch: Callable[..., Any], family: str) -> None:
    layers = decoder_layers(scratch(family))
    assert len(layers) == 2
    with pytest.raises(XtokenError, match="no list of layers"):
        decoder_layers(layers[0].__class__.__base__())


@pytest.mark.thorough
@pytest.mark.engine
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_give_the_same_gradients(
    scratch: Callable[..., Any], ids: torch.Tensor, recompute: bool
) -> None:
    """At two lengths, so that shapes are dynamic; names stay those of the plain model."""
    plain, compiled = scratch("gemma3").train(), prepare(scratch("gemma3"), recompute, compile=True)
    for length in (12, 7):
        expected, found = gradients(plain, ids[:, :length]), gradients(compiled, ids[:, :length])
        assert expected.keys() == found.keys()
        for name, grad in expected.items():
            assert (found[name] - grad).norm() <= COMPILED_WITHIN * grad.norm(), (name, length)


def test_no_compiler_is_said_before_training(scratch: Callable[..., Any]) -> None:
    import torch._inductor.config as inductor
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    # torch's own way: what monkeypatch puts back stays hidden from whatever is compiled later
    with (
        inductor.patch("cpp.cxx", ("no-such-compiler",)),
        fresh_cache(),
        pytest.raises(XtokenError, match="needs a C\\+\\+ compiler"),
    ):
        prepare(scratch("untied"), activation_checkpointing=False, compile=True)


class TestStraightToADevice:
    """A student that is read to its GPU tensor by tensor."""

    def test_where(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = torch.device("cuda", 1)
        assert straight_to(CPU) == {}, "on the CPU as ever"
        assert straight_to(gpu) == {"device_map": {"": gpu}}
        monkeypatch.setattr("xtoken.trainer.student.model.find_spec", lambda _: None)
        assert straight_to(gpu) == {}, "without accelerate"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_bits_are_the_same(
        self, scratch: Callable[..., Any], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of weights that lie there in bfloat16, and of buffers that are not among them."""
        save_student(scratch(family).bfloat16(), "bytes", tmp_path)
        plain = load_student(str(tmp_path), CPU, False)
        monkeypatch.setattr("xtoken.trainer.student.model.straight_to", lambda device: {"device_map": {"": device}})
        straight = load_student(str(tmp_path), CPU, False)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = (dict(getattr(one, kind)()) for one in (straight, plain))
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert ours[name].dtype == value.dtype, name
                assert torch.equal(ours[name], value), name
