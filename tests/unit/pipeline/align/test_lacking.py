"""align says what sorted lists lose at another temperature, with the share that REST of the same rows has."""

from pathlib import Path

import pytest

from xtoken.pipeline.align import run_captures
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.ui.progress import Silent

TAU = Path(__file__).parents[3] / "golden" / "captures" / "v3-tau"  # rows with normalisers at 0.5 and 2


@pytest.mark.parametrize(("tau", "said"), [(2.0, True), (0.5, False)])
def test_the_share_is_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture, tau: float, said: bool) -> None:
    out = str(tmp_path / "t")
    config = AlignConfig(captures=[str(TAU)], student="bytes", out=out, losses=["p-kl", "gold", "uld"], tau=tau)
    figures = run_captures(config, Silent())
    assert ("notes" in figures) == said
    if said:
        (note,) = figures["notes"]
        assert caplog.messages == [note]
        # REST of all parts is what this says of the first
        share = float(note.split(" lack ")[1].split("%")[0]) / 100
        assert share == pytest.approx(figures["teacher_mass"]["rest"], abs=0.03)
