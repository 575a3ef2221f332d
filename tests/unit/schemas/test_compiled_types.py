"""Processes that fill numba's disk cache together take nothing that was compiled for other types."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
from xtoken.schemas.compiled import compiled

@compiled
def total(values):
    found = 0.0
    for value in values:
        found += value
    return found
"""
CALL = "import sys, numpy as np, totals; print(totals.total(np.ones(3, sys.argv[1])), *totals.total.stats.cache_hits)"


def call(folder: Path, dtype: str) -> list[str]:
    """The sum of three ones, and the types that the cache on disk had code for."""
    path = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(Path(__file__).resolve().parents[3] / '.dev')!r}]; "
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-c", path + CALL, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split(maxsplit=1)


def test_code_for_other_types_is_not_taken(tmp_path: Path) -> None:
    """As two processes leave it that start at the same moment: the index of one, the file of the other."""
    (tmp_path / "totals.py").write_text(CODE)
    call(tmp_path, "int32")
    cache = tmp_path / "__pycache__"
    (mine,) = cache.glob("totals.total-*.nbc")
    (index,) = cache.glob("totals.total-*.nbi")
    code = mine.read_bytes()
    mine.unlink()
    index.unlink()
    call(tmp_path, "float32")
    mine.write_bytes(code)
    assert call(tmp_path, "float32")[0].split()[0] == "3.0"
    value, hits = call(tmp_path, "float32")
    assert (value, "float32" in hits) == ("3.0", True), "and what was compiled again is kept"
