"""Conversations through the command line: ``xtoken eval --text chats.jsonl``, and what ``xtoken train`` refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from xtoken import cli

TALKS: list[dict[str, Any]] = [
    {
        "id": "web/one",
        "messages": [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "It is four."},
            {"role": "user", "content": "And 3 + 3?"},
            {"role": "assistant", "content": "Six, café."},
            {"role": "user", "content": "Thanks!"},
        ],
    },
    {
        "id": "code/two",
        "messages": [{"role": "user", "content": "Say b."}, {"role": "assistant", "content": "b, surely"}],
    },
    {
        "id": "code/three",
        "messages": [{"role": "user", "content": "word " * 90}, {"role": "assistant", "content": "too long"}],
    },
]


@pytest.fixture
def small(smollm2_dir: Path, tmp_path: Path) -> Path:
    """A small random model with SmolLM2's tokenizer and chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, initializer_range=1.0, **sizes)).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm2_dir / name, tmp_path / "model" / name)
    return tmp_path / "model"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(cli.app, [*map(str, words), "--json", "--quiet"])


def figures(*words: Any) -> dict[str, Any]:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def bits(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, float]:
    """Of the contents of answers and of what ends them, by transformers' own rendering."""
    found = {"assistant": 0.0, "stop": 0.0}
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(before, add_special_tokens=False).input_ids
        answer = tokenizer(message["content"], add_special_tokens=False).input_ids
        with torch.no_grad():
            logp = model(torch.tensor([[*ids, *answer, 2]])).logits[0].double().log_softmax(-1)
        for i, token in enumerate([*answer, 2], len(ids)):
            kind = "stop" if i == len(ids) + len(answer) else "assistant"
            found[kind] -= float(logp[i - 1, token]) / math.log(2)
    return found


def test_bits_per_byte_of_conversations(small: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chats = written(tmp_path / "chats.jsonl", TALKS[:2])
    found = figures("eval", small, "--text", chats, "--id-field", "id", "--device", "cpu")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small), AutoTokenizer.from_pretrained(small)
    each = [bits(model, tokenizer, talk["messages"]) for talk in TALKS[:2]]
    sizes = [len("It is four.Six, café.".encode()), len("b, surely")]
    total = [one["assistant"] + one["stop"] for one in each]
    answers = sum(one["assistant"] for one in each)
    assert found["bytes"] == sum(sizes)
    assert found["bits_per_byte"] == pytest.approx(sum(total) / sum(sizes), rel=1e-5)
    assert found["by_kind"]["stop"] == {
        "bits_per_token": pytest.approx(sum(one["stop"] for one in each) / 3, rel=1e-5),
        "tokens": 3,
    }
    assert found["by_source"]["web"] == {
        "bits_per_byte": pytest.approx(total[0] / sizes[0], rel=1e-5),
        "bytes": sizes[0],
    }
    assert found["by_kind"]["assistant"]["bits_per_byte"] == pytest.approx(answers / sum(sizes), rel=1e-5)


def test_reasoning_counts_when_it_is_asked_for(small: Path, tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    rows = [{"messages": [TALKS[1]["messages"][0], {"role": "assistant", "content": "b", "reasoning_content": "hm"}]}]
    chats = written(tmp_path / "chats.jsonl", rows)
    words = ("eval", small, "--text", chats, "--template", template, "--device", "cpu")
    assert set(figures(*words)["by_kind"]) == {"assistant"}
    assert figures(*words, "--learn", "thinking")["by_kind"]["thinking"]["bytes"] == 2


def test_a_template_is_told_what_it_was_trained_with(small: Path, tmp_path: Path) -> None:
    """Its variables and its day stand in what the model reads before an answer."""
    template = tmp_path / "told.jinja"
    template.write_text(
        "{{ strftime_now('%Y') }} {{ mode }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    plain = tmp_path / "plain.jinja"
    plain.write_text("1999 loud\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    chats = written(tmp_path / "chats.jsonl", TALKS[1:2])
    words = ("eval", small, "--text", chats, "--device", "cpu")
    asked = figures(*words, "--template", template, "--template-arg", "mode=loud", "--date", "1999-07-04")
    other = figures(*words, "--template", template, "--template-arg", "mode=loud", "--date", "2001-07-04")
    assert asked == figures(*words, "--template", plain)
    assert asked["bits_per_byte"] != other["bits_per_byte"]


def test_what_does_not_fit_is_left_out_by_name(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chats = written(tmp_path / "chats.jsonl", TALKS)
    words = ("eval", small, "--text", chats, "--id-field", "id", "--device", "cpu", "--max-tokens", "100")
    with caplog.at_level("WARNING", "xtoken"):
        found = figures(*words)
    assert found["bytes"] == len("It is four.Six, café.".encode()) + len("b, surely")
    assert "1 of 3 held-out conversations are left out, such as code/three: longer than --max-tokens" in caplog.text


WRONG = {
    "chats.jsonl, line 2: id 'web/one' was seen before": [TALKS[0], TALKS[0]],
    "has no field 'id'": [TALKS[0], {"messages": TALKS[1]["messages"]}],
    "not an object": [TALKS[0], 7],
    "chats.jsonl, line 1: unknown role": [{"id": "a", "messages": [{"role": "narrator", "content": "x"}]}],
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_row_is_named(small: Path, tmp_path: Path, said: str) -> None:
    chats = written(tmp_path / "chats.jsonl", WRONG[said])
    result = run("eval", small, "--text", chats, "--id-field", "id", "--device", "cpu")
    assert result.exit_code != 0
    assert said in " ".join(result.output.split())


def test_text_stays_text(small: Path, tmp_path: Path) -> None:
    """Even beside messages; and a file that is not there is named."""
    chats = written(tmp_path / "chats.jsonl", [{"text": "plain words", **TALKS[0]}])
    found = figures("eval", small, "--text", chats, "--device", "cpu")
    assert found["bytes"] == len("plain words")
    assert "by_kind" not in found
    result = run("eval", small, "--text", tmp_path / "none.jsonl", "--device", "cpu")
    assert "none.jsonl" in result.output
    for flag, value in (("--template-arg", "a=1"), ("--date", "2026-07-04"), ("--learn", "thinking")):
        result = run("eval", small, "--text", chats, "--device", "cpu", flag, value)
        assert f"{flag}: for conversations, and --text" in " ".join(result.output.split())


def test_a_model_without_a_template(small: Path, tmp_path: Path) -> None:
    config = json.loads((small / "tokenizer_config.json").read_text())
    (small / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    result = run("eval", small, "--text", written(tmp_path / "chats.jsonl", TALKS[:1]), "--device", "cpu")
    assert "has no chat template" in " ".join(result.output.split())


@pytest.mark.parametrize("flag", [("--template", "t.jinja"), ("--learn", "thinking")])
def test_flags_of_conversations_need_text(flag: tuple[str, str]) -> None:
    result = run("eval", "m", "--targets", "t", *flag)
    assert f"{flag[0]} is for conversations of --text" in " ".join(result.output.split())
