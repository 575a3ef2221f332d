"""What transformers loads but refuses to write is put right, said, and never costs a trained model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.ranks import gathered
from xtoken.trainer.student.model import load_student, open_student, rehearse_save, save_student
from xtoken.trainer.student.writable import mend_settings

CPU = torch.device("cpu")
CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.fixture
def stored(scratch: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """``stored(config.json fields, generation_config.json fields)``: a folder that says these, too."""

    def make(config: dict[str, Any], generation: dict[str, Any] | None = None) -> str:
        folder = tmp_path / "stored"
        save_student(scratch("tied"), "bytes", folder)
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(fields | config))
        (folder / GENERATION).unlink()  # without it transformers makes one of config.json
        if generation is not None:
            (folder / GENERATION).write_text(json.dumps(generation))
        return str(folder)

    return make


def written(model: Any, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json as ``save_student`` writes them; the folder loads again."""
    save_student(model, "bytes", out)
    again = load_student(str(out), CPU, False)
    assert mend_settings(again) == [], "what was written needs no mending"
    return json.loads((out / CONFIG).read_text()), json.loads((out / GENERATION).read_text())


def refused(model: Any, out: Path) -> bool:
    """Whether transformers alone would not write this model."""
    try:
        model.save_pretrained(out, state_dict={})
    except Exception:  # the errors share no base
        return True
    return False


@pytest.mark.parametrize(
    ("config", "generation", "found", "said"),
    [
        ({"pad_token_id": -1}, None, {"pad_token_id": None}, "config.json: pad_token_id -1 is written as none"),
        ({}, {"pad_token_id": -1}, {"pad_token_id": None}, "pad_token_id -1 is written as none"),
        ({}, {"eos_token_id": [5, -1], "pad_token_id": -1}, {"eos_token_id": [5]}, "[5, -1] is written as [5]"),
        ({"temperature": 0.5}, None, {"temperature": 0.5, "do_sample": True}, "do_sample is written as true"),
        ({}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}, "do_sample"),
        ({}, {"do_sample": False, "temperature": 0.6}, {"do_sample": False, "temperature": None}, "temperature 0.6"),
        ({}, {"temperature": 0.0}, {"do_sample": None, "temperature": None}, "temperature 0.0 is left out"),
        ({}, {"early_stopping": True, "top_k": 9}, {"do_sample": True, "top_k": 9}, "early_stopping True is left out"),
        ({}, {"output_scores": True, "num_beams": 2, "length_penalty": 2.0}, {"length_penalty": 2.0}, "output_scores"),
        ({}, {"use_cache": False, "cache_implementation": "static"}, {"use_cache": False}, "cache_implementation"),
        ({"output_attentions": True}, None, {}, "config.json: output_attentions is turned off"),
    ],
)
def test_settings_are_written_valid_and_named(
    stored: Callable[..., str],
    tmp_path: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    found: dict[str, Any],
    said: str,
) -> None:
    model = load_student(stored(config, generation), CPU, False)
    assert refused(model, tmp_path / "theirs"), "nothing to mend, nothing to test"
    changes = mend_settings(model)
    assert any(said in change for change in changes), changes
    _, settings = written(model, tmp_path / "ours")
    assert {name: settings.get(name) for name in found} == found


def test_what_is_right_stays_as_it_is(stored: Callable[..., str], tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.7, "eos_token_id": [1, 2], "pad_token_id": 2, "num_beams": 3}
    model = load_student(stored({"eos_token_id": 300, "pad_token_id": 0}, generation), CPU, False)
    assert mend_settings(model) == []
    config, settings = written(model, tmp_path / "ours")
    assert (config["eos_token_id"], config["pad_token_id"]) == (300, 0), "an id that the head lacks is no harm"
    assert {name: settings[name] for name in generation} == generation


def test_padding_of_minus_one_is_not_the_last_token(stored: Callable[..., str], ids: torch.Tensor) -> None:
    """torch counts it from the end: that token's embedding would get no gradient."""
    model = load_student(stored({"pad_token_id": -1, "tie_word_embeddings": True}), CPU, False)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == len(embedding.weight) - 1
    mend_settings(model)
    last = torch.full_like(ids, len(embedding.weight) - 1)
    model.model(input_ids=last, use_cache=False)[0].sum().backward()
    assert embedding.weight.grad[-1].any()


def test_a_note_of_quantised_weights_is_dropped_with_plain_ones(stored: Callable[..., str], tmp_path: Path) -> None:
    note = {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": False}
    model = load_student(stored({"quantization_config": note}), CPU, False)
    assert mend_settings(model) == ["config.json: quantization_config is left out, the weights are plain"]
    config, _ = written(model, tmp_path / "ours")
    assert "quantization_config" not in config


def test_a_quantised_student_is_refused(
    configure: Callable[..., TrainConfig],
    scratch: Callable[..., Any],
    bytes_info: TokenizerInfo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its quantiser stands for a library that is not here."""
    from types import SimpleNamespace

    model = scratch("tied")
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    monkeypatch.setattr("xtoken.trainer.student.model.load_student", lambda *_: model)
    config = configure({}, from_scratch=None, student="acme/q")
    with pytest.raises(XtokenError, match=r"model 'acme/q' is quantised \(gptq\).*give the model"):
        open_student(config.student, CPU, bytes_info, seed=0)


def test_what_is_no_json_is_left_out(scratch: Callable[..., Any], tmp_path: Path) -> None:
    """As code that comes with a model may leave in its configuration."""
    model = scratch("untied")
    model.config.helper = object()
    assert refused(model, tmp_path / "theirs")
    assert mend_settings(model) == ["config.json: helper is left out, a object is not JSON"]
    written(model, tmp_path / "ours")


@pytest.mark.parametrize("fields", [{"pad_token_id": 4000}, {"hidden_act": "nope"}, {"eos_token_id": "</s>"}])
def test_a_config_that_makes_no_model_is_refused_in_a_line(stored: Callable[..., str], fields: dict[str, Any]) -> None:
    with pytest.raises(XtokenError, match=r"stored' cannot be loaded: .*; give a folder or a reachable id") as error:
        load_student(stored(fields), CPU, False)
    assert "\n" not in str(error.value)


def test_what_cannot_be_mended_is_refused_before_the_first_step(scratch: Callable[..., Any], tmp_path: Path) -> None:
    model = scratch("untied")
    model.config.layer_types = ["full_attention"]
    mend_settings(model)
    with pytest.raises(XtokenError, match=r"refuses to write this LlamaForCausalLM \(.*layer_types.*config.json"):
        rehearse_save(model, "bytes", tmp_path / "rehearsal")


def test_a_rehearsal_keeps_the_tokenizer(scratch: Callable[..., Any], tmp_path: Path) -> None:
    """The folder it came from may be gone when training ends."""
    source, model = tmp_path / "source", scratch("tied")
    save_student(model, "bytes", source)
    files = rehearse_save(model, str(source), tmp_path / "rehearsal")
    kept = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer.json").unlink()
    save_student(model, files, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == kept
    assert not list((tmp_path / "rehearsal").rglob("*.safetensors")), "weights are not written twice"


def test_tokenizer_files_that_cannot_be_copied_are_said(
    scratch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "tokenizer.json")

    monkeypatch.setattr("xtoken.trainer.student.model.copy_tokenizer", unreadable)
    with pytest.raises(XtokenError, match=r"tokenizer 'acme' cannot be copied \(.*denied.*make them readable"):
        rehearse_save(scratch("tied"), "acme", tmp_path / "rehearsal")


def test_weights_that_share_memory_are_written(scratch: Callable[..., Any], tmp_path: Path) -> None:
    model = scratch("untied")
    whole = model.model.layers[0].mlp.up_proj.weight.data
    model.model.layers[0].mlp.gate_proj.weight.data = whole
    state = gathered(dict(model.named_parameters()), keep=True)
    save_student(model, "bytes", tmp_path / "model", state)
    loaded = load_student(str(tmp_path / "model"), CPU, False)
    assert torch.equal(loaded.model.layers[0].mlp.gate_proj.weight, whole)
