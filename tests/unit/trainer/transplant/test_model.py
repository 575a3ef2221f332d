"""Models of several families under another vocabulary: what transformers loads again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from xtoken.schemas.configs.transplant import TransplantConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.token_map import CONTROL, EQUAL, PIECES, UNUSED, TokenMap
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.student.model import load_student
from xtoken.trainer.transplant import NewVocabulary, new_model_folder, open_old_model, transplant

FAMILIES = ("tied", "untied", "gemma3", "bias", "gpt2")
INFO = TokenizerInfo(name="new", hash="d" * 64, kind="byte-level", size=30, adds_bos=False, bos_id=3, eos_id=4)
ORDER = np.random.default_rng(1).permutation(36)[:30]  # ids 36 to 39 of the old head belong to no token
KINDS = [EQUAL] * 3 + [CONTROL] * 2 + [EQUAL] * 25


def permuted() -> TokenMap:
    return TokenMap(
        ORDER.astype(np.int32),
        np.arange(31, dtype=np.int64),
        np.array(KINDS, np.int8),
        np.arange(36, dtype=np.int32),
    )


def moved(
    source: str, folder: Path, token_map: TokenMap, check: Callable[[], None] = lambda: None, **options: Any
) -> Any:
    folder.mkdir()
    given = {"tokenizer": "t", **options}
    config = TransplantConfig(model=source, out=str(folder), **given)
    old = open_old_model(source, False)
    figures = transplant(config, old, NewVocabulary(INFO, 7, token_map, check), folder, Silent())
    return old, figures


def logits(folder: str | Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.no_grad():
        found: torch.Tensor = auto.from_pretrained(folder, dtype="auto").eval()(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_vocabulary_gives_permuted_logits(saved: Callable[..., str], family: str, tmp_path: Path) -> None:
    source = saved(family)
    old, figures = moved(source, tmp_path / "new", permuted())
    tied = family in ("tied", "gemma3", "gpt2")
    assert (figures["tied"], figures["rows"], figures["rows_before"]) == (tied, 30, 40)
    assert figures["classes"] == {
        "control": 2,
        "equal": 28,
        "pieces": 0,
        "undecodable": 0,
        "new_control": 0,
        "unused": 0,
        "padded": 0,
    }
    new_ids = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(3))
    before = logits(source, torch.from_numpy(ORDER)[new_ids])
    after = logits(tmp_path / "new", new_ids)
    assert torch.allclose(after, before[..., torch.from_numpy(ORDER)], rtol=0, atol=1e-6)
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - no dictionary
    assert sum(shape == (30, 16) for shape in shapes) == (1 if tied else 2)
    config = old.model.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (30, 3, 4, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_files_stays(saved: Callable[..., str], dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved("untied", dtype)
    _, figures = moved(source, tmp_path / "new", permuted())
    assert figures["dtype"] == str(dtype).removeprefix("torch.")
    names = []
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no dictionary
            names.append(name)
            assert file.get_tensor(name).dtype == dtype
    assert "lm_head.weight" in names


def test_a_head_of_bytes_is_its_own_and_stays_so(saved: Callable[..., str], tmp_path: Path) -> None:
    for family in ("tied", "gemma3", "gpt2"):
        source = saved(family)
        _, figures = moved(source, tmp_path / f"{family}-new", permuted(), tokenizer="bytes")
        assert figures["tied"] is False
        again = open_old_model(str(tmp_path / f"{family}-new"), False)
        assert not again.tied
        assert torch.equal(again.embedding_RH, again.head_RH)
        again.head_RH.zero_()
        assert again.embedding_RH.abs().sum() > 0


def test_padded_rows_are_the_mean_and_are_not_generated(saved: Callable[..., str], tmp_path: Path) -> None:
    kinds = [*KINDS[:-1], UNUSED]
    found = TokenMap(
        ORDER[:29].astype(np.int32),
        np.array([*range(30), 29], np.int64),
        np.array(kinds, np.int8),
        np.arange(36, dtype=np.int32),
    )
    source = saved("untied")
    old, figures = moved(source, tmp_path / "new", found, pad_to=16)
    assert (figures["rows"], figures["classes"]["padded"], figures["classes"]["unused"]) == (32, 2, 1)
    before = open_old_model(source, False)
    for now, was in ((old.embedding_RH, before.embedding_RH), (old.head_RH, before.head_RH)):
        mean = was[:36].double().mean(0).float()
        assert torch.equal(now[29:], mean.repeat(3, 1))
    assert old.model.generation_config.suppress_tokens == [29, 30, 31]
    assert figures["notes"][-1].startswith("the last 2 rows are padding")
    again = open_old_model(str(tmp_path / "new"), False).model
    drawn = again.generate(
        torch.tensor([[1, 2]]), max_new_tokens=20, do_sample=True, temperature=50.0, num_return_sequences=20
    )
    assert int(drawn.max()) < 29


def test_generation_stops_where_it_did(saved: Callable[..., str], tmp_path: Path) -> None:
    """EOS of the new tokenizer, and a control token whose row is that of an old end."""
    source = saved("tied", eos_token_id=[int(ORDER[3]), int(ORDER[0])], suppress_tokens=None)
    old, _ = moved(source, tmp_path / "new", permuted())
    assert old.model.generation_config.eos_token_id == [3, 4], "id 0 is no control token"
    assert old.model.config.eos_token_id == 4


def test_what_is_refused(saved: Callable[..., str], tmp_path: Path) -> None:
    few = TokenMap(np.array([40], np.int32), np.arange(2), np.array([PIECES], np.int8), np.array([40], np.int32))
    with pytest.raises(XtokenError, match=r"has 40 rows, but its config\.json says that there is one for token 40"):
        moved(saved("tied"), tmp_path / "a", few)

    def other() -> None:
        raise XtokenError("another tokenizer")

    with pytest.raises(XtokenError, match="another tokenizer"):
        moved(saved("tied"), tmp_path / "b", permuted(), other)
    assert not list((tmp_path / "b").glob("*.safetensors")), "seen before a weight is written"


def test_a_model_without_what_is_needed_is_refused(saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    source = saved("tied")
    llama: Any = transformers.LlamaForCausalLM
    monkeypatch.setattr(llama, "get_output_embeddings", lambda _: None)
    with pytest.raises(XtokenError, match="has no linear output head"):
        open_old_model(source, False)
    monkeypatch.undo()
    monkeypatch.setattr(llama, "get_input_embeddings", lambda _: None)
    with pytest.raises(XtokenError, match=r"cannot be loaded|has no input embedding"):
        open_old_model(source, False)
    monkeypatch.undo()
    with pytest.raises(XtokenError, match="cannot be loaded"):
        open_old_model(source + "-gone", False)


def test_a_second_table_by_token_is_refused(saved: Callable[..., str]) -> None:
    source = saved("gpt2", n_positions=40)
    with pytest.raises(XtokenError, match=r"second table by token, transformer\.wpe"):
        open_old_model(source, False)


@pytest.mark.parametrize("family", ["tied", "gemma3"])
def test_old_tokens_stay_beside_the_bytes(saved: Callable[..., str], family: str, tmp_path: Path) -> None:
    """Each text token's row as the old embedding gave it, scale included; tokens beyond the rows are left out."""
    source, folder = saved(family), tmp_path / "new"
    folder.mkdir()
    config = TransplantConfig(model=source, out=str(folder), tokenizer="bytes", expand_inputs=True)
    text = {b"ab": 5, b"c": 2, b"far": 40}
    vocabulary = NewVocabulary(INFO, 7, permuted(), lambda: None, text)
    figures = transplant(config, open_old_model(source, False), vocabulary, folder, Silent())
    assert figures["expanded_by"] == 2
    model = load_student(str(folder), torch.device("cpu"), False)
    old = open_old_model(source, False).model
    assert model.tokens == [b"ab", b"c"]
    assert torch.equal(model.rows[:-1], old.get_input_embeddings()(torch.tensor([5, 2])))
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_a_model_with_expanded_inputs_is_refused(saved: Callable[..., str], tmp_path: Path) -> None:
    """It would read the first 256 ids of any tokenizer as bytes."""
    source, folder = saved("tied"), tmp_path / "new"
    folder.mkdir()
    config = TransplantConfig(model=source, out=str(folder), tokenizer="bytes", expand_inputs=True)
    vocabulary = NewVocabulary(INFO, 7, permuted(), lambda: None, {b"ab": 5})
    transplant(config, open_old_model(source, False), vocabulary, folder, Silent())
    with pytest.raises(XtokenError, match=r"has expanded inputs, .*give the model that it was made from"):
        open_old_model(str(folder), False)


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path) -> None:
    """Such as one to a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with new_model_folder(TransplantConfig(model="m", tokenizer="t", out=str(tmp_path / "out"))) as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "disk" / "config.json").read_text() == "{}"
    assert (tmp_path / "out").is_symlink()


def test_a_model_of_ids_alone_is_not_expanded(saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Any) -> Any:
        raise NotImplementedError

    old = open_old_model(saved("tied"), False)
    monkeypatch.setattr(type(old.model), "forward", forward)
    with pytest.raises(XtokenError, match="takes no inputs_embeds; leave --expand-inputs out"):
        old.inputs_of([1])


def test_expanding_is_for_bytes() -> None:
    with pytest.raises(ValueError, match="--expand-inputs is for --tokenizer bytes"):
        TransplantConfig(model="m", out="o", tokenizer="t", expand_inputs=True)
