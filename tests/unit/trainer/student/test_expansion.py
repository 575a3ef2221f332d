"""Inputs of a model of bytes with the old token that ends there, against brute force, however the model is called."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from xtoken.schemas.errors import XtokenError
from xtoken.trainer.ensemble import Ensemble
from xtoken.trainer.student.adapters import add_adapters
from xtoken.trainer.student.expansion import FILE, Endings, ExpandedModel
from xtoken.trainer.student.head import find_head, packing_changes_nothing
from xtoken.trainer.student.model import load_student, save_student

TOKENS = [b"a", b"ab", b"abab", b"b", b"bab", b"c", b" the", b"he", b"e", b"\xe3\x81", b"abc"]
BYTES, WIDTH = 260, 16
CPU = torch.device("cpu")


def by_hand(ids: list[int], fresh: list[bool]) -> list[int]:
    """For each place every token, tried on the bytes since the last beginning."""
    found = []
    for at in range(len(ids)):
        start = max([0, *(i for i in range(at + 1) if fresh[i]), *(i + 1 for i in range(at + 1) if ids[i] >= 256)])
        text = bytes(ids[start : at + 1]) if ids[at] < 256 else b""
        ending = [token for token, data in enumerate(TOKENS) if data and text.endswith(data)]
        found.append(max(ending, key=lambda token: len(TOKENS[token]), default=-1))
    return found


def test_longest_token_that_ends_at_each_byte() -> None:
    draw = random.Random(5)
    letters = [*b"abc the\xe3\x81\x82", 256, 259]
    endings = Endings(TOKENS)
    for _ in range(300):
        ids = [draw.choice(letters) for _ in range(draw.randrange(1, 30))]
        fresh = [draw.random() < 0.1 for _ in ids]
        found, node = endings.read(ids, fresh)
        assert found == by_hand(ids, fresh)
        cut = draw.randrange(len(ids) + 1)
        first, between = endings.read(ids[:cut], fresh[:cut])
        rest, last = endings.read(ids[cut:], fresh[cut:], between)
        assert (first + rest, last) == (found, node)


def make(family: str = "llama") -> ExpandedModel:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": BYTES,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "pad_token_id": 259,
    }
    config: Any = (
        transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
        if family == "llama"
        else transformers.Gemma3TextConfig(**sizes, head_dim=8, query_pre_attn_scalar=8, tie_word_embeddings=False)
    )
    inner = transformers.AutoModelForCausalLM.from_config(config).eval()
    return ExpandedModel(inner, TOKENS, torch.randn(len(TOKENS), WIDTH)).eval()


def text(*pieces: bytes | int) -> torch.Tensor:
    ids = [one for piece in pieces for one in ([piece] if isinstance(piece, int) else piece)]
    return torch.tensor([ids])


IDS = text(256, b"abab the abc", 257, b"he")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_the_model_sees(family: str) -> None:
    """The rows of byte and token added up by hand; where no token ends, the byte's alone."""
    model = make(family)
    own = model.inner.get_input_embeddings()(IDS)[0]
    extra = torch.zeros_like(own)
    for at, token in enumerate(by_hand(IDS[0].tolist(), [False] * IDS.shape[1])):
        if token >= 0:
            extra[at] = model.rows[token]
    assert (extra.abs().sum(1) == 0).sum() > 2
    with torch.no_grad():
        expected = model.inner(inputs_embeds=(own + extra)[None]).logits
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=0)
        assert not torch.equal(model(input_ids=IDS).logits, model.inner(input_ids=IDS).logits)


def test_a_cache_goes_on_from_the_bytes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        output = model(input_ids=IDS[:, :5], use_cache=True)
        parts = [output.logits]
        for at in range(5, IDS.shape[1]):
            output = model(input_ids=IDS[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        foreign = model.inner(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(XtokenError, match="cache was not filled by a model with expanded inputs"):
        model(input_ids=IDS[:, :1], past_key_values=foreign)


def test_head_and_packing_are_found() -> None:
    """Samples of one row are told apart by their positions."""
    head = find_head(make())
    assert head.fusable
    assert packing_changes_nothing(head)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path: Path) -> None:
    model = make(family)
    state = {name: one for name, one in model.state_dict().items() if not name.endswith("inv_freq")}
    assert "rows" not in state, "frozen rows are in no checkpoint"
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    save_student(model, tokenizer, tmp_path / "model", state)
    again = load_student(str(tmp_path / "model"), CPU, False).eval()
    assert isinstance(again, ExpandedModel)
    assert not any(one is again.rows for one in again.parameters())
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)
    save_student(again, tokenizer, tmp_path / "twice")
    for name in ("model.safetensors", FILE, "config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    with pytest.raises(ValueError, match="xtoken_expanded_bytes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    save_student(make(), tokenizer, tmp_path / "model")
    file = tmp_path / "model" / FILE
    tensors = load_file(file)
    shorter = tensors | {"rows": tensors["rows"][:-1].clone()}
    other = tensors | {"rows": torch.zeros(len(TOKENS), WIDTH + 1)}
    for broken in (shorter, other, {"rows": tensors["rows"]}):
        save_file(broken, file)
        with pytest.raises(XtokenError, match=r"expansion.safetensors is damaged"):
            load_student(str(tmp_path / "model"), CPU, False)
    file.write_bytes(b"no safetensors")
    with pytest.raises(XtokenError, match=r"expansion.safetensors is damaged"):
        load_student(str(tmp_path / "model"), CPU, False)
    save_file(tensors, file)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(XtokenError, match=r"its config.json is damaged"):
        load_student(str(tmp_path / "model"), CPU, False)


def test_adapters_are_refused() -> None:
    with pytest.raises(XtokenError, match="--lora does not go with a model of expanded inputs"):
        add_adapters(make(), 2)


def test_in_an_ensemble_rows_stay_where_they_are() -> None:
    """Greedily a cache changes nothing; beams would exchange rows whose bytes the model remembers apart."""
    ensemble, ids = Ensemble([make(), make("gemma")], "prob", 259), text(256, b"abab the")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    plain = ensemble.generate(ids, use_cache=False, **options)
    assert torch.equal(ensemble.generate(ids, use_cache=True, **options), plain)
    with pytest.raises(XtokenError, match="call generate with num_beams=1"):
        ensemble.generate(ids, num_beams=2, **options)
