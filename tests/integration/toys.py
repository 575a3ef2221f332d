"""The toy vocabularies and target folders of the trainer's unit tests, for tests that start processes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def toys() -> ModuleType:
    """tests/unit/trainer/conftest.py as a module."""
    path = ROOT / "tests" / "unit" / "trainer" / "conftest.py"
    spec = importlib.util.spec_from_file_location("xtoken_toys", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
