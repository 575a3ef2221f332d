"""A model whose head lacks tokens of its tokenizer's text is refused when it is named, not when it is trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from xtoken.pipeline.align import run_captures
from xtoken.pipeline.capture import precompute
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.usefixtures("one_worker_is_here")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model_folder(name, fields, special)``: 256 bytes, EOS, and a token more; ``fields`` are its config.json."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str, fields: dict[str, object], special: bool) -> Path:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: n + 1 for n, letter in enumerate(letters)} | {"<|end|>": 0}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|end|>"])
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(["<think>"])
        (root / name).mkdir()
        tokenizer.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
        (root / name / "config.json").write_text(json.dumps(fields))
        return root / name

    return make


@pytest.mark.thorough
def test_align_and_precompute_refuse_a_narrow_head(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Boats on the river. " * 20)
    narrow = model_folder("narrow", {"vocab_size": 257}, special=False)
    given = {"corpus": str(tmp_path / "a.txt"), "teacher": str(narrow), "k": 8}
    with pytest.raises(XtokenError, match=r"narrow predicts 257 tokens.*the first is '<think>', 257"):
        precompute(PrecomputeConfig.from_flat(**given, out=str(tmp_path / "none"), backend="hf"), Silent())
    assert not (tmp_path / "none" / "run.json").exists()
    for name in ("a", "b"):
        precompute(
            PrecomputeConfig.from_flat(**given, out=str(tmp_path / name), backend="fake"), Silent()
        )  # it has no head
    for captures in (["a"], ["a", "b"]):
        folders, out = [str(tmp_path / name) for name in captures], tmp_path / f"targets-{len(captures)}"
        with pytest.raises(XtokenError, match=r"narrow predicts 257 tokens.*the first is '<think>', 257"):
            run_captures(AlignConfig(captures=folders, student=str(narrow), out=str(out)), Silent())
        assert not out.exists()
    control = model_folder("control", {"vocab_size": 257}, special=True)
    wide = model_folder("wide", {"text_config": {"vocab_size": 320}}, special=False)
    for student in (control, wide):
        config = AlignConfig(captures=[str(tmp_path / "a")], student=str(student), out=str(tmp_path / student.name))
        assert run_captures(config, Silent())["samples"] == 1
