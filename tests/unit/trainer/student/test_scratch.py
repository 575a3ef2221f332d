"""Students from config.json: the same bytes for a seed, fit for their tokenizer, refused with a way out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xtoken.schemas.configs.train import TrainConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.student.model import open_student
from xtoken.trainer.student.scratch import read_config

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).resolve().parents[4] / "examples" / "configs"
_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_one_seed_is_one_model(scratch: Callable[..., Any]) -> None:
    """Another seed is another one, and the caller's random state stays."""
    before = torch.get_rng_state()
    one, same, other = (scratch("untied", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_special_ids_are_the_tokenizers(
    configure: Callable[..., TrainConfig], llama: dict[str, Any], bytes_info: TokenizerInfo
) -> None:
    """Byte 1 is no BOS, byte 7 no padding (its embedding would stay untrained), and unused columns are not drawn."""
    model = open_student(configure(llama).student, CPU, bytes_info, seed=0)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert model.generation_config.suppress_tokens == list(range(256, 264))
    model(input_ids=torch.tensor([[7, 8]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[7].abs().sum() > 0
    other = bytes_info.model_copy(update={"size": 250, "bos_id": 2, "eos_id": 3})
    model = open_student(configure(llama | {"pad_token_id": 255}).student, CPU, other, seed=0)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (2, 3, 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "lama"}, "knows no model_type 'lama'"),
        ({"model_type": "clip"}, "CLIP"),
        ({"vocab_size": 255}, "vocab_size 255, but tokenizer 'bytes' has 256 tokens; set vocab_size to 256 or more"),
        ({"hiden_size": 64}, "sets hiden_size, which LlamaConfig does not have"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"auto_map": {"AutoConfig": "odd.OddConfig"}}, "--trust-remote-code"),
    ],
)
def test_what_is_no_model_is_refused(
    configure: Callable[..., TrainConfig],
    llama: dict[str, Any],
    bytes_info: TokenizerInfo,
    change: dict[str, Any],
    message: str,
) -> None:
    fields = {key: value for key, value in (llama | change).items() if value is not None}
    with pytest.raises(XtokenError, match=message):
        open_student(configure(fields).student, CPU, bytes_info, seed=0)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "no.* object")]
)
def test_what_is_no_config_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(XtokenError, match=message):
        read_config(path, trust_remote_code=False)


def test_code_beside_the_config_runs_when_trusted(
    configure: Callable[..., TrainConfig],
    llama: dict[str, Any],
    bytes_info: TokenizerInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    config = configure(llama | {"model_type": "odd", "auto_map": auto_map}, trust_remote_code=True)
    (tmp_path / "odd.py").write_text(_CODE)
    model = open_student(config.student, CPU, bytes_info, seed=0)
    assert type(model).__name__ == "OddModel"
    assert model.config.hidden_size == 32


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_examples_describe_models(path: Path) -> None:
    """Each example builds, and its name says its size in millions of parameters."""
    from transformers import AutoModelForCausalLM

    config = read_config(path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions) == int(path.stem.rsplit("-", 1)[1].removesuffix("m")), millions


def test_real_config_files_are_read(smollm2_dir: Path, gemma3_dir: Path) -> None:
    for folder in (smollm2_dir, gemma3_dir):
        fields = json.loads((folder / "config.json").read_text())
        config = read_config(folder / "config.json", trust_remote_code=False)
        assert config.model_type == fields["model_type"]
        assert config.rope_parameters == fields["rope_parameters"]
