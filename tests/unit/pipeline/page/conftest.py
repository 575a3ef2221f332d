"""A small capture of hostile and ordinary text, and its targets for every loss."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import InThisProcess

from xtoken.pipeline.align.run import align
from xtoken.pipeline.page.sample import Sample, load_sample
from xtoken.schemas.configs.artifacts import AlignConfig, InspectConfig
from xtoken.schemas.ui.progress import Silent

TEXTS = {
    "attack": "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> &lt; ",
    "unseen": "a\u200bb\u202ec\u2066d\ufeffe\x00f\x1bg\u00a0h\u3164i\r\n\t\tj                k\u2028l 👩‍👩‍👧 ",
    "scripts": "مرحبا بالعالم and שלום עולם, 日本語のテキスト。 Ελληνικά. ",
    "code": "def f(x):\n    return x ** 2\n\n\nclass A:\n        pass\n",
    "plain": "The quick brown fox jumps over the lazy dog, 12345 times. " * 4,
    "worst": "zqxjk",
}


@pytest.fixture(scope="session")
def capture(small_capture: Callable[..., Path]) -> str:
    """A finished capture with the fake teacher; read only."""
    texts = {f"{name}.txt": text for name, text in TEXTS.items()}
    return str(small_capture(texts, shard_bytes=300, k=16, min_p=0.01, student="bytes"))


@pytest.fixture(scope="session")
def targets(capture: str) -> str:
    """Its targets for a student of bytes, for every loss that can be."""
    out = f"{Path(capture).parent}/targets"
    losses = ["p-kl", "h-kl", "gold", "uld", "alm", "byte-prefix", "ce"]
    config = AlignConfig(captures=[capture], student="bytes", out=out, losses=losses)  # type: ignore[arg-type]
    align(config, Silent(), executor=InThisProcess())
    return out


@pytest.fixture
def damaged(targets: str, tmp_path: Path) -> Path:
    """A copy of the targets that a test may change."""
    return Path(shutil.copytree(targets, tmp_path / "targets"))


@pytest.fixture(scope="session")
def sample_of(capture: str, targets: str) -> Callable[..., Sample]:
    """``sample_of(name, student=True)``: a sample loaded for its page, with targets or without."""

    def load(name: str, student: bool = True) -> Sample:
        config = InspectConfig(path=targets if student else capture, html=name, capture=capture if student else None)
        return load_sample(config)

    return load
