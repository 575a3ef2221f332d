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


def test_other_threads_run_meanwhile() -> None:
    """A loop ends early where another thread of Python gets to raise a flag while it runs."""
    code = """
import threading, numpy as np
from xtoken.schemas.compiled import compiled

@compiled
def until(flag, seen, most):
    for i in range(most):
        seen[i & 7] = i
        if flag[0]:
            return i
    return most

flag, seen, most = np.zeros(1, np.int64), np.zeros(8, np.int64), 4 * 10**9
until(flag, seen, 1)
raiser = threading.Timer(0.05, flag.fill, [1])
raiser.start()
print(until(flag, seen, most) < most)
"""
    folder = Path(__file__).resolve().parents[3] / ".dev"
    path = {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
