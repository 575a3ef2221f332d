"""What tests/conftest.py adds to every run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_of_a_tool(n):
    pytest.skip("chromium is not installed: apt-get install chromium")

def test_of_nothing():
    pytest.skip("not for this teacher")

def test_measures(figure):
    figure("3 tokens/s")
"""


def test_what_a_missing_tool_skips_is_said_last(tmp_path: Path) -> None:
    """Only a figure and the number of tests stand around it, though pytest's own list of skips is long."""
    (tmp_path / "test_it.py").write_text(FILE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/.dev:{ROOT}/tests", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "tests.conftest", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "3 tokens/s" in lines
    assert "NOT TESTED" in lines[-3]
    assert lines[-2] == "3 skipped: chromium is not installed: apt-get install chromium"
    assert "1 passed, 4 skipped" in lines[-1]
