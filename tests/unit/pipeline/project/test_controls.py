"""Control tokens that do the same in two tokenizers, and a chat template in the other's tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtoken.pipeline.project.controls import control_pairs, translated, turn_marks
from xtoken.pipeline.project.new_tokenizer import _refuse_donor, finish_files, pick_template, read_template
from xtoken.pipeline.project.transplant import map_tokens
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.configs.transplant import TransplantConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.token_map import PIECES

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
CHAT = [
    {"role": role, "content": said}
    for role, said in (("user", "Who was she?"), ("assistant", "Ada."), ("user", "When?"), ("assistant", "1843."))
]
Opened = Callable[[str], tuple[TextTokenizer, str | None]]


@pytest.fixture(scope="module")
def opened(tokenizer_file: Callable[[str], Path]) -> Opened:
    """``opened(name)``: a real tokenizer and its own chat template; once each."""
    found: dict[str, tuple[TextTokenizer, str | None]] = {}

    def find(name: str) -> tuple[TextTokenizer, str | None]:
        if name not in found:
            folder = tokenizer_file(name).parent
            found[name] = load_tokenizer(str(folder)), read_template(folder)
        return found[name]

    return find


def named(pairs: dict[int, int], new: TextTokenizer, old: TextTokenizer) -> dict[str, str]:
    return {new.controls[token]: old.controls[of] for token, of in sorted(pairs.items())}


def test_turns_of_real_templates(opened: Opened) -> None:
    marks = {}
    for name in ("smollm2", "llama3", "qwen3"):
        tokenizer, template = opened(name)
        marks[name] = {mark: tokenizer.controls[token] for mark, token in turn_marks(tokenizer, template).items()}
    roles = ("user", "assistant")
    for name, begin, end in (
        ("smollm2", "<|im_start|>", "<|im_end|>"),
        ("qwen3", "<|im_start|>", "<|im_end|>"),
        ("llama3", "<|start_header_id|>", "<|eot_id|>"),
    ):
        wanted = {f"open {role}": begin for role in roles} | {f"close {role}": end for role in roles}
        assert marks[name] == wanted, name


def test_a_template_that_fails_or_is_missing_tells_nothing_but_the_role(opened: Opened) -> None:
    tokenizer, _ = opened("llama3")
    eot = next(token for token, name in tokenizer.controls.items() if name == "<|eot_id|>")
    for template in (None, "{{ raise_exception('never') }}", "{% broken", "{{ messages[0]['content'] }}"):
        assert turn_marks(tokenizer, template) == {"close user": eot, "close assistant": eot}


def test_pairs_by_role_name_and_place(opened: Opened) -> None:
    old, ours = opened("smollm2")
    new, theirs = opened("llama3")
    found = named(control_pairs(new, old, theirs, ours), new, old)
    assert found == {
        "<|begin_of_text|>": "<|im_start|>",  # both are BOS
        "<|end_of_text|>": "<|im_end|>",  # both are EOS
        "<|start_header_id|>": "<|im_start|>",  # both begin a turn
        "<|eot_id|>": "<|im_end|>",  # both end one
    }
    new, theirs = opened("qwen3")
    found = named(control_pairs(new, old, theirs, ours), new, old)
    assert found["<|im_start|>"] == "<|im_start|>"
    assert found["<|im_end|>"] == "<|im_end|>"
    assert "<|object_ref_start|>" not in found
    new, theirs = opened("llama2")
    found = named(control_pairs(new, old, theirs, ours), new, old)
    assert found == {"<unk>": "<|endoftext|>", "<s>": "<|im_start|>", "</s>": "<|im_end|>"}


@pytest.mark.parametrize("name", ["qwen3", "llama3", "llama2"])
def test_a_moved_template_writes_the_same_tokens(
    opened: Opened, tokenizer_file: Callable[[str], Path], name: str
) -> None:
    """Each control token of the rendered chat is one whose row is the old one's; the text between is the same."""
    from transformers import PreTrainedTokenizerFast

    old, ours = opened("smollm2")
    new, theirs = opened(name)
    pairs = control_pairs(new, old, theirs, ours)
    assert ours is not None
    moved = translated(ours, old, new, theirs, pairs)
    assert moved is not None
    fast: Any = PreTrainedTokenizerFast
    chats = [
        fast(tokenizer_file=str(tokenizer_file(of))).apply_chat_template(CHAT, chat_template=template, tokenize=False)
        for of, template in (("smollm2", ours), (name, moved))
    ]
    for old_name in ("<|im_start|>", "<|im_end|>"):
        at = chats[0].index(old_name)
        new_name = next(control for control in new.controls.values() if control and chats[1][at:].startswith(control))
        token = next(token for token, control in new.controls.items() if control == new_name)
        assert old.controls[pairs[token]] == old_name
        chats[0] = chats[0].replace(old_name, "\x01")
        chats[1] = chats[1].replace(new_name, "\x01")
    assert chats[0] == chats[1]


def test_a_template_is_not_moved_where_a_token_is_missing(opened: Opened) -> None:
    """Llama-3's end of a header has no counterpart; and two tokens are not to become one."""
    old, ours = opened("llama3")
    new, theirs = opened("smollm2")
    assert ours is not None
    assert translated(ours, old, new, theirs, control_pairs(new, old, theirs, ours)) is None
    plain, _ = opened("llama2")
    qwen, template = opened("qwen3")
    pairs = control_pairs(plain, qwen, None, template)
    assert template is not None
    assert translated(CHATML, qwen, plain, None, pairs) is None, "Qwen3 has no BOS: nothing begins a turn"


def test_whose_template_it_is(opened: Opened) -> None:
    """The model's, where the new tokenizer has its tokens; else the tokenizer's own; else none."""
    (smollm2, chatml), (llama3, headers), (llama2, _) = opened("smollm2"), opened("llama3"), opened("llama2")
    assert pick_template(smollm2, llama3, None, headers, {}) == (headers, "tokenizer")
    assert pick_template(smollm2, llama2, None, None, {}) == (None, "none")
    pairs = control_pairs(llama3, smollm2, headers, chatml)
    assert pick_template(smollm2, llama3, chatml, headers, pairs)[1] == "model"
    qwen3, theirs = opened("qwen3")
    begins = "{{ bos_token }}{{ messages[0]['content'] }}"
    pairs = control_pairs(qwen3, smollm2, theirs, begins)
    assert pick_template(smollm2, qwen3, begins, theirs, pairs) == (theirs, "tokenizer"), "Qwen3 has no BOS"
    pairs = control_pairs(llama3, smollm2, headers, begins)
    assert pick_template(smollm2, llama3, begins, headers, pairs) == (begins, "model")


def test_a_donor_that_shares_nothing_is_refused(opened: Opened, tokenizer_file: Callable[[str], Path]) -> None:
    qwen3, _ = opened("qwen3")
    folder = str(tokenizer_file("qwen3").parent)
    nothing = map_tokens(qwen3.table, opened("llama2")[0].table, {})
    nothing = replace(nothing, kind=np.full_like(nothing.kind, PIECES))
    config = TransplantConfig(model="m", tokenizer=folder, out="o", init="omp", donor=folder)
    with pytest.raises(XtokenError, match=r"--donor .* shares no token of text with m"):
        _refuse_donor(config, qwen3, nothing)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    config, template = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    config.write_text('{"chat_template": ["default", {"name": "tools"}, {"name": "default", "template": "mine"}]}')
    assert read_template(tmp_path) == "mine"
    config.write_text('{"chat_template": ["default"]}')
    assert read_template(tmp_path) is None
    template.write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(XtokenError, match=r"chat_template\.jinja is not UTF-8 \(invalid start byte\)"):
        read_template(tmp_path)


def test_files_name_their_roles_and_one_template(
    opened: Opened, tokenizer_file: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file("qwen3").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    tokenizer, _ = opened("qwen3")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old", "tokenizer_class": "Qwen2Tokenizer"}')
    assert read_template(tmp_path) == "old"
    finish_files(tmp_path, tokenizer, "new")
    assert read_template(tmp_path) == "new"
    again = load_tokenizer(str(tmp_path))
    assert again.table.info.hash == tokenizer.table.info.hash
    finish_files(tmp_path, tokenizer, None)
    assert read_template(tmp_path) is None
