"""Text that a chat template wrote is named and refused before any teacher runs; a mention of a token is not."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.capture.multi_teacher import each_below, one_after_the_other
from xtoken.pipeline.capture.rendered_chat import REASON, Look
from xtoken.pipeline.corpus import Document
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.usefixtures("one_worker_is_here")

CHATML = "<|im_start|>user\nHow many boats in {}?<|im_end|>\n<|im_start|>assistant\nSeventeen.<|im_end|>\n"
GEMMA = "<start_of_turn>user\nHow many boats in {}?<end_of_turn>\n<start_of_turn>model\nSeventeen.<end_of_turn>\n"
RENDERED = [
    ("qwen3", CHATML),
    ("gemma3", GEMMA),
    ("llama3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nBoats?<|eot_id|>"),
    ("llama2", "<s>[INST] How many boats? [/INST] Seventeen. </s>"),
    ("llama3", "one text<|end_of_text|>another text<|end_of_text|>"),
    ("qwen3", "one text<|endoftext|>\n"),
    ("qwen3", "Seventeen boats.<|im_end|>"),
    ("gemma3", " <bos>one text"),
    ("llama2", "<s> one text"),
    ("llama2", "one text</s>"),
]
TEXT = [
    ("qwen3", "GPT-2 ends a text with <|endoftext|>, and so do others."),
    ("llama2", "<p>11 pounds, not <s>12</s>"),
    ("llama2", "prices: <s>12</s> 11 pounds, <s>9</s> 8 pounds</s>"),
    ("llama2", "the <unk> of <unk> was <unk>"),
    ("gemma3", "<table><tr><td>[INST]</td></tr></table> <pad> <pad>"),
    ("gemma3", CHATML),  # pieces of text to this teacher, as they were always
    ("qwen3", "<think>these are</think> <tool_call>tokens of text</tool_call>"),
]


@pytest.fixture
def look(tokenizer_file: Callable[[str], Path]) -> Callable[[str], Look]:
    return lambda name: Look(name, _controls(tokenizer_file(name)), refuse=True)


@cache
def _controls(path: Path) -> frozenset[str]:
    return frozenset(load_tokenizer(str(path)).controls.values())


def documents(*texts: str) -> list[Document]:
    return [Document(f"d{number}", text, 0, number) for number, text in enumerate(texts)]


@pytest.mark.parametrize(("name", "text"), RENDERED)
def test_control_tokens_of_the_teacher_itself(look: Callable[[str], Look], name: str, text: str) -> None:
    found = look(name)
    with pytest.raises(XtokenError, match=rf"1 of 1 documents \(100%\) hold control tokens of {name} as text \(<"):
        list(found.over(documents(text)))


@pytest.mark.parametrize(("name", "text"), TEXT)
def test_mentions_and_other_words_in_brackets(look: Callable[[str], Look], name: str, text: str) -> None:
    found = look(name)
    assert list(found.over(documents(text))) == documents(text)
    assert found.counts == {}


def test_tokens_of_any_shape() -> None:
    found = Look("t", ["[INST]", "[/INST]", ">>ASK<<", ">>ASK<<>", "a|b", "<s>"], refuse=False)
    texts = ("[INST] x [/INST]", ">>ASK<<> a|b", "x [INST] [x] <y> >>ask<<", "<s> a|b")
    list(found.over(documents(*texts)))
    assert found.counts == {REASON: 3}
    assert Look("t", [], refuse=True).counts == {}


def test_few_in_many_documents_are_counted_and_no_more() -> None:
    rendered, plain = "<|a|>x<|b|>", "plain"
    found = Look("t", ["<|a|>", "<|b|>"], refuse=True)
    list(found.over(documents(*[rendered], *[plain] * 100)))
    assert found.counts == {REASON: 1}
    found = Look("t", ["<|a|>", "<|b|>"], refuse=True)
    with pytest.raises(XtokenError, match=r"2 of 101 documents \(2%\) .* \(<\|a\|>, <\|b\|>; the first is 'd0'\)"):
        list(found.over(documents(*[rendered] * 2, *[plain] * 99)))


def test_no_need_to_read_a_whole_corpus_of_them() -> None:
    found = Look("t", ["<|a|>"], refuse=True)
    many = documents(*["<|a|><|a|>"] * 3000)
    with pytest.raises(XtokenError, match=r"1,000 of 1,000 documents"):
        list(found.over(many))


@pytest.fixture
def config(tmp_path: Path, tokenizer_file: Callable[[str], Path]) -> PrecomputeConfig:
    texts = [f"<s>[INST] How many boats in {year}? [/INST] Seventeen. </s>" for year in range(2010, 2014)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "c.jsonl"),
        teacher=str(tokenizer_file("llama2").parent),
        backend="fake",
        out=str(tmp_path / "out"),
        k=8,
    )


class Never:
    """An executor that must not be reached."""

    def run(self, *_: object) -> dict[int, str]:
        raise AssertionError("a teacher would have run")


def test_the_run_stops_before_any_teacher_and_leaves_nothing(config: PrecomputeConfig) -> None:
    config = config.changed(backend="hf")
    with pytest.raises(XtokenError, match=r"4 of 4 documents \(100%\).*--on-rendered text"):
        precompute(config, Silent(), executor=Never())
    assert not Path(config.out).exists()
    with pytest.raises(XtokenError, match="4 of 4 documents"):
        dry_run(config.changed(dry_run=True), Silent())


def test_the_fake_teacher_says_so_and_goes_on(config: PrecomputeConfig, caplog: pytest.LogCaptureFixture) -> None:
    manifest = precompute(config, Silent())
    assert manifest is not None
    assert manifest.corpus.bad == {REASON: 4}
    assert caplog.text.count("4 of 4 documents (100%) hold control tokens") == 1
    assert "<s>" in caplog.text


def test_it_is_text_if_told_so(config: PrecomputeConfig, caplog: pytest.LogCaptureFixture) -> None:
    manifest = precompute(config.changed(on_rendered="text"), Silent())
    assert "control tokens" not in caplog.text
    assert manifest is not None
    assert manifest.corpus.bad == {REASON: 4}
    assert precompute(config, Silent()) == manifest, "what is there was told so"


def test_a_plan_made_for_another_teacher_is_looked_at(config: PrecomputeConfig) -> None:
    first = config.changed(teacher="bytes")
    each = [
        one.changed(backend=backend) for one, backend in zip(each_below([first, config]), ("fake", "hf"), strict=True)
    ]
    found = list(one_after_the_other(each, lambda one: precompute(one, Silent())))
    assert found[0].error is None
    assert found[0].result is not None
    assert found[0].result.corpus.bad == {}
    assert "4 of 4 documents" in str(found[1].error)
