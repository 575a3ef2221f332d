"""Chat models of real families: their own templates and tokenizers."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from xtoken.pipeline.chats import ChatModel, open_chat_model

Model = Callable[[str], ChatModel]
DAY = datetime(2026, 7, 4)
# No package carries Phi-3's files. These are templates of its two forms on Llama-2's vocabulary, with Phi-3's markers,
# which eat the blanks behind them: mini knows system messages and ends with EOS; medium leaves them out and writes the
# answer's header behind the question. Both leave out what tools say.
PHI3 = {
    "phi3-mini": (
        "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
        "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    ),
    "phi3-medium": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    ),
}
_MARKERS = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
QUICK = ["smollm2", "qwen3", "phi3-medium", "chatglm3"]
SLOW = ["llama3", "llama3_1", "gemma3", "deepseek_v3", "phi3-mini"]
ALL = [*QUICK, *SLOW]


def each(names: list[str] = ALL) -> list[Any]:
    """Names of models as parameters; loading those of ``SLOW`` takes seconds."""
    return [pytest.param(name, marks=[pytest.mark.thorough] if name in SLOW else [], id=name) for name in names]


@pytest.fixture(scope="session")
def model(tokenizer_file: Callable[[str], Path], demo_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """``model(name)``: a chat model, loaded once."""
    loaded: dict[str, ChatModel] = {}

    def find(name: str) -> ChatModel:
        if name not in loaded:
            source = "llama2" if name in PHI3 else name
            tokenizer_file("llama3" if name == "gemma3" else source)  # skips where there is no npm
            # the package of Gemma-3's chat model, not the base model of the demo
            folder = demo_models.prepare_tokenizer(name) if name == "gemma3" else tokenizer_file(source).parent
            if name in PHI3 or name == "chatglm3":
                folder = _with_markers(name, folder, tmp_path_factory.mktemp(name))
            loaded[name] = open_chat_model(str(folder), date=DAY)
        return loaded[name]

    return find


def _with_markers(name: str, source: Path, folder: Path) -> Path:
    """A tokenizer with the markers that its template writes; ChatGLM3's package lists them beside tokenizer.json."""
    spec = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    there = {token["content"] for token in spec["added_tokens"]} | spec["model"]["vocab"].keys()
    listed = [token["content"] for token in config.get("added_tokens_decoder", {}).values()]
    wanted = [token for token in (_MARKERS if name in PHI3 else listed) if token not in there]
    first = max(spec["model"]["vocab"].values()) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": name in PHI3, "normalized": False, "special": True}
    spec["added_tokens"] += [{"id": first + at, "content": token, **flags} for at, token in enumerate(wanted)]
    if name in PHI3:
        config |= {"chat_template": PHI3[name], "eos_token": "<|endoftext|>", "bos_token": "<s>"}
        config.pop("additional_special_tokens", None)
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
