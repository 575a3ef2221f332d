"""The audit weighted by a capture: the teacher's mass, the page, and what the terminal shows."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from xtoken.pipeline.project import Audit, build_w, coverage, project
from xtoken.pipeline.project.mass import Mass, teacher_mass
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.configs.artifacts import ProjectConfig
from xtoken.schemas.manifest import CaptureManifest, ProjectionManifest, read_manifest
from xtoken.schemas.ui.progress import Silent
from xtoken.schemas.ui.tables import figure_tables

TEXTS = {"a.txt": "The quick fox, 12345 jumps; naïve. " * 12, "b.txt": "日本語 x = [1, 22]\n\t" * 20, "c.txt": "short"}
STEP = 1 / 32
TOGETHER = 1e-12  # float64 sums in another order


@pytest.fixture(scope="module")
def capture(small_capture: Callable[..., Path]) -> str:
    return str(small_capture(TEXTS, max_tokens=32, shard_bytes=400, k=16, min_p=0.01))


def slow_mass(capture: str, limit: int) -> tuple[dict[int, float], float, int]:
    """Row by row, entry by entry."""
    mass: dict[int, float] = defaultdict(float)
    rest, rows = 0.0, 0
    samples = [sample for batch in iter_capture(capture) for sample in batch.to_pylist()]
    for sample in samples:
        entries = iter(zip(sample["topk_ids"], sample["topk_gap"], strict=True))
        for kept, gap in zip(sample["kept"], sample["rest_gap"], strict=True):
            level = 0
            for _ in range(kept):
                token, step = next(entries)
                level += step
                mass[token] += float(np.exp(-STEP * level)) if rows < limit else 0.0
            if rows < limit:
                rest += float(np.exp(-STEP * gap)) if gap != 65535 else 0.0
                rows += 1
    return mass, rest, rows


@pytest.mark.parametrize("limit", [1, 50, 10**6])
def test_mass_against_a_slow_sum(capture: str, limit: int) -> None:
    mass, rest, rows = slow_mass(capture, limit)
    found = teacher_mass(capture, limit)
    assert found is not None
    assert found.rows == rows == min(limit, sum(p.rows for p in read_manifest(capture, CaptureManifest).parts))
    total = sum(mass.values()) + rest
    mass = {token: value for token, value in mass.items() if value}
    assert found.share_U[list(mass)] == pytest.approx([value / total for value in mass.values()], abs=TOGETHER)
    assert np.count_nonzero(found.share_U) == len(mass)
    assert found.not_kept == pytest.approx(rest / total, abs=TOGETHER)
    assert found.share_U.sum() + found.not_kept == pytest.approx(1)


def test_project_weighs_by_a_capture(capture: str, tmp_path: Path) -> None:
    out = tmp_path / "w"
    config = ProjectConfig(student="bytes", teacher=capture, out=str(out), mass_rows=100)
    manifest = project(config, Silent())
    found = manifest.coverage
    assert found["mass_rows"] == 100
    assert sum(row["mass"] for row in found["columns"].values()) == pytest.approx(1, abs=1e-5)
    assert "over 100 rows the teacher gives" in found["advice"]["reason"]
    assert read_manifest(str(out), ProjectionManifest) == manifest
    page = (out / "coverage.html").read_bytes()
    assert b"over 100 of its rows" in page
    project(config, Silent())
    assert (out / "coverage.html").read_bytes() == page


def test_the_mass_of_moved_tokens_is_counted_where_it_goes(capture: str, table: Callable[[str], TokenTable]) -> None:
    student, teacher = table("bytes"), table("smollm2")
    projection, mass = build_w(student, teacher), teacher_mass(capture, 10**6)
    assert mass is not None
    found = coverage(Audit.of(projection, student, teacher, mass))
    moved = dict(zip(projection.unreached.tolist(), projection.moved_to.tolist(), strict=True))
    by_first: dict[str, float] = defaultdict(float)
    for t, to in moved.items():
        if to >= 0:
            text = teacher.token(to)
            kind = "numerals_1" if text.isdigit() else "latin" if text.isalpha() else "?"
            by_first[kind] += float(mass.share_U[t])
    for kind in ("numerals_1", "latin"):
        if kind in found["moved_into"]:
            assert found["moved_into"][kind]["mass"] == pytest.approx(by_first[kind], abs=1e-6)
    assert "latin" in found["moved_into"]


def test_tables_fit_eighty_columns(table: Callable[[str], TokenTable]) -> None:
    student, teacher = table("llama2"), table("smollm2")
    share_U = np.full(teacher.size, 0.9 / teacher.size)
    figures = coverage(Audit.of(build_w(student, teacher), student, teacher, Mass(share_U, 0.1, 10**6)))
    figures["categories"]["latin"] |= {"student": 151_122, "exact": 165_949, "pieces": 106_396, "teacher": 157_363}
    console = Console(width=80, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(*figure_tables(figures), sep="\n")
    lines = [line.split() for line in console.export_text().splitlines()]
    assert sum(line[:1] == ["categories"] for line in lines) == 1
    (latin,) = [line for line in lines if line[:1] == ["latin"] and len(line) == 10]
    assert latin[1:4] == ["151,122", "165,949", "106,396"]
