"""A small capture of documents in several writing systems, and its targets for two students."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import InThisProcess

from xtoken.pipeline.align.run import align
from xtoken.pipeline.query import query
from xtoken.schemas.configs.artifacts import AlignConfig, QueryConfig
from xtoken.schemas.ui.progress import Silent

TEXTS = {
    "book/en/one": "The quick brown fox, 12345 jumps; naïve café. " * 12,
    "book/en/two": "Call me Ishmael. Some years ago - never mind how long precisely - I went to sea.\n" * 6,
    "book/ja/one": "日本語のテキスト。吾輩は猫である。名前はまだ無い。" * 8,
    "book/zh/one": "道可道，非常道。名可名，非常名。" * 8,
    "book/ru/one": "Все счастливые семьи похожи друг на друга. 1234 + 5678\n" * 6,
    "code/a.py": "def f(x):\n        return x + 100\n\n\n" * 10,
    "plain": "👩‍👩‍👧 ? 12",
}
Asked = Callable[..., list[dict[str, Any]]]


def ask(path: Path | str, sql: str, capture: Path | str | None = None, **options: Any) -> list[dict[str, Any]]:
    """Rows of a query."""
    given = None if capture is None else str(capture)
    rows: list[dict[str, Any]] = query(QueryConfig(path=str(path), sql=sql, capture=given, **options))["rows"]
    return rows


@pytest.fixture(scope="session")
def capture(small_capture: Callable[..., Path]) -> Path:
    """A finished capture by the fake teacher; read only."""
    return small_capture(TEXTS, id_field="id", shard_bytes=1000, k=16, min_p=0.01)


def aligned(capture: Path, student: str, losses: list[str], out: Path) -> Path:
    """Targets of a capture."""
    align(
        AlignConfig(captures=[str(capture)], student=student, out=str(out), losses=losses),
        Silent(),
        executor=InThisProcess(),
    )
    return out


@pytest.fixture(scope="session")
def targets(capture: Path, tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets for the tokenizer of Llama-2, which puts a space before the text, and nearly every loss; read only."""
    losses = ["p-kl", "h-kl", "gold", "uld", "alm", "byte-prefix"]
    return aligned(capture, str(tokenizer_file("llama2")), losses, tmp_path_factory.mktemp("targets") / "llama2")


@pytest.fixture(scope="session")
def byte_targets(capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets for a student of bytes, for h-kl only; read only."""
    return aligned(capture, "bytes", ["h-kl"], tmp_path_factory.mktemp("targets") / "bytes")


@pytest.fixture(scope="session")
def same_targets(
    capture: Path, tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Targets for the teacher's own tokenizer; read only."""
    losses = ["sparse-kl"]
    return aligned(capture, str(tokenizer_file("smollm2")), losses, tmp_path_factory.mktemp("targets") / "same")
