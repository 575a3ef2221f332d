"""One small real capture for the tests of this folder."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from xtoken.pipeline.capture import precompute
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.ui.progress import Silent

TEXTS = {
    "a.txt": "The quick brown fox, 12345 jumps; naïve café. " * 30,
    "b.txt": "日本語のテキスト。 Ελληνικά γράμματα, и кириллица! 👩‍👩‍👧 end.\r\n\tdef f(x):\n        return x\n" * 12,
    "c.txt": "short",
}


@pytest.fixture(scope="session")
def kept_capture(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Callable[[str], Path]) -> Path:
    """A finished capture of three documents with the fake teacher; read only."""
    root = tmp_path_factory.mktemp("capture")
    (root / "corpus").mkdir()
    for name, text in TEXTS.items():
        (root / "corpus" / name).write_text(text, newline="")
    config = PrecomputeConfig(
        corpus=str(root / "corpus"),
        teacher=str(tokenizer_file("smollm2")),
        out=str(root / "capture"),
        backend="fake",
        max_tokens=64,
        shard_bytes=1000,
        k=16,
        min_p=0.01,
        student="bytes",
    )
    precompute(config, Silent())
    return root / "capture"


@pytest.fixture
def capture(kept_capture: Path, tmp_path: Path) -> Path:
    """A copy of the capture that a test may damage."""
    return Path(shutil.copytree(kept_capture, tmp_path / "capture"))
