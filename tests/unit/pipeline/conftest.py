"""Small real captures for the tests of this folder, made by one builder."""

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import InProcess, InThisProcess
from talks import TALKS

from xtoken.pipeline.align.run import align
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.chats import open_chat_model, read_row
from xtoken.pipeline.executors.local import LocalExecutor
from xtoken.pipeline.teachers import BACKENDS
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.ui.progress import Silent

TEXTS = {
    "a.txt": "The quick brown fox, 12345 jumps; naïve café. " * 30,
    "b.txt": "日本語のテキスト。 Ελληνικά γράμματα, и кириллица! 👩‍👩‍👧 end.\r\n\tdef f(x):\n        return x\n" * 12,
    "c.txt": "short",
}


@pytest.fixture
def vllm_gives_the_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that never sees whole rows, as one of others may be."""
    monkeypatch.setitem(BACKENDS, "vllm", BACKENDS["vllm"]._replace(full_rows=False))


SmallCapture = Callable[..., Path]
IDS_SETTINGS: dict[str, Any] = {"max_tokens": 160, "k": 16, "shard_bytes": 100}


@pytest.fixture(scope="session")
def small_capture(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Callable[[str], Path]) -> SmallCapture:
    """``small_capture(texts, teacher="smollm2", **settings)``: a finished capture by the fake teacher; read only.

    Texts are files by their names, or with ``id_field`` documents of one file by their ids; lists of messages are
    conversations of one file by their ids, and objects are records of token ids. Settings are those of
    ``PrecomputeConfig``. It is made once for the same
    texts and settings.
    """
    made: dict[str, Path] = {}

    def build(texts: Mapping[str, Any], teacher: str = "smollm2", **settings: Any) -> Path:
        key = json.dumps([texts, teacher, settings])
        if key not in made:
            root = tmp_path_factory.mktemp("capture")
            config = PrecomputeConfig.from_flat(
                corpus=str(_write_corpus(root / "corpus", texts, settings)),
                teacher=teacher if teacher == "bytes" else str(tokenizer_file(teacher)),
                out=str(root / "capture"),
                backend="fake",
                **{"max_tokens": 64} | settings,
            )
            precompute(config, Silent(), executor=InProcess())
            made[key] = root / "capture"
        return made[key]

    return build


def _write_corpus(root: Path, texts: Mapping[str, Any], settings: dict[str, Any]) -> Path:
    root.mkdir()
    is_chat = any(isinstance(text, list) for text in texts.values())
    if is_chat or any(isinstance(text, dict) for text in texts.values()):
        settings["id_field"] = "id"
    if settings.get("id_field") is not None:
        field = "messages" if is_chat else "text"
        records = (text if isinstance(text, dict) else {field: text} for text in texts.values())
        lines = (
            json.dumps({settings["id_field"]: name, **record}, ensure_ascii=False)
            for name, record in zip(texts, records, strict=True)
        )
        (root / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    else:
        for name, text in texts.items():
            (root / name).write_text(text, newline="", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def chat_capture(small_capture: SmallCapture) -> Path:
    """A finished capture of the conversations of ``talks.py`` by a teacher with Qwen3's template; read only.

    Thinking is taught, and the parts are several.
    """
    talks = {f"talk/{name}": talk for name, talk in TALKS.items()}
    return small_capture(
        talks, "qwen3", max_tokens=96, shard_bytes=150, k=16, min_p=0.01, learn=["thinking"], on_bad="skip"
    )


@pytest.fixture(scope="session")
def chat_targets(
    chat_capture: Path, tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its targets for a student with another template, for p-kl and alm; read only."""
    out = tmp_path_factory.mktemp("targets") / "chats"
    student = str(tokenizer_file("smollm2").parent)
    config = AlignConfig(captures=[str(chat_capture)], student=student, out=str(out), losses=["p-kl", "alm"])
    align(config, Silent(), executor=InThisProcess())
    return out


@pytest.fixture(scope="session")
def ids_rows(tokenizer_file: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """Some conversations of ``talks.py`` as tokens of SmolLM2's template, with labels."""
    model, found = open_chat_model(str(tokenizer_file("smollm2")), date=datetime(2026, 7, 4)), {}
    for name in ("plain", "system", "blanks", "hostile"):
        tokens = model.encode(read_row({"messages": TALKS[name]}, "messages"))
        labels = np.where(tokens.learn, tokens.ids, -100).tolist()
        found[name] = {"input_ids": tokens.ids.tolist(), "labels": labels}
    return found


@pytest.fixture(scope="session")
def ids_capture(
    small_capture: SmallCapture, ids_rows: dict[str, dict[str, Any]], tokenizer_file: Callable[[str], Path]
) -> Path:
    """A finished capture of ``ids_rows``, in several parts; read only."""
    return small_capture(ids_rows, **IDS_SETTINGS, tokenizer=str(tokenizer_file("smollm2")))


@pytest.fixture(scope="session")
def kept_capture(small_capture: SmallCapture) -> Path:
    """A finished capture of three documents; read only."""
    return small_capture(TEXTS, shard_bytes=1000, k=16, min_p=0.01, student="bytes")


@pytest.fixture
def capture(kept_capture: Path, tmp_path: Path) -> Path:
    """A copy of the capture that a test may damage."""
    return Path(shutil.copytree(kept_capture, tmp_path / "capture"))


@pytest.fixture
def one_worker_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what runs write, not of processes: a lone worker needs none, as in ``in_process``; two are two."""
    for name, here in (("capture.precompute", InProcess), ("align.run", InThisProcess)):

        def executor(workers: int, *more: Any, here: type = here) -> Any:
            return here() if workers == 1 else LocalExecutor(workers, *more)

        # by its name: the package exports a function under the module's
        monkeypatch.setattr(importlib.import_module(f"xtoken.pipeline.{name}"), "LocalExecutor", executor)
