"""Real models and tokenizers for tests, prepared on first use, and figures shown at the end of a run."""

import gc
import importlib.util
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import loaded_once
import pytest
from xdist.scheduler import LoadScopeScheduling

# Before anything imports a library that reads them: no network behind a test's back, engines in this process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read once per process: all clusters of one process need the same
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: threads of each would take the cores from each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# How quick a machine is decides nothing, and the same code is given the same examples; make soak looks for others.
_PATIENT: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("same", derandomize=True, **_PATIENT)
hypothesis.settings.register_profile("few", derandomize=True, max_examples=20, **_PATIENT)  # make unit
hypothesis.settings.register_profile("other", **_PATIENT)
hypothesis.settings.load_profile("same")

loaded_once.install()

ROOT = Path(__file__).resolve().parent.parent
FIGURE = "figure"


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_works() -> None:
    """A background job of a script ignores Ctrl-C, and so would every process that these tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def no_garbage_collection() -> Generator[None]:
    """For tests that interrupt themselves: Python drops an interrupt that arrives in a callback of the collector, such
    as hypothesis has.
    """
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _left_as_made() -> Generator[None]:
    """No test writes into what all of them share."""
    yield
    assert loaded_once.changed() == []


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Remote files of tests do not go to the cache of whoever runs them."""
    os.environ["XTOKEN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def _load_demo_models() -> ModuleType:
    """examples/demo_models.py, by path: other packages also install a top-level ``examples``."""
    name = "xtoken_demo_models"
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "demo_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def demo_models() -> ModuleType:
    """The module examples/demo_models.py."""
    return _load_demo_models()


@pytest.fixture(scope="session")
def models_dir(demo_models: ModuleType) -> Path:
    """Folder with both demo models."""
    for name in demo_models.MODELS:
        demo_models.prepare_model(name)
    return Path(demo_models.MODELS_DIR)


@pytest.fixture(scope="session")
def smollm2_dir(demo_models: ModuleType) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    return Path(demo_models.prepare_model("smollm2-135m"))


@pytest.fixture(scope="session")
def gemma3_dir(demo_models: ModuleType) -> Path:
    """Gemma-3-270m as a Hugging Face folder."""
    return Path(demo_models.prepare_model("gemma-3-270m"))


@pytest.fixture(scope="session")
def tokenizer_file(demo_models: ModuleType) -> Callable[[str], Path]:
    """``tokenizer_file(name)``: a real tokenizer.json, its tokenizer_config.json beside it.

    Names: smollm2, gemma3 (the base model), and those of demo_models.TOKENIZERS, which are skipped without npm.
    """
    models = {"smollm2": "smollm2-135m", "gemma3": "gemma-3-270m"}

    def find(name: str) -> Path:
        if name in models:
            return Path(demo_models.prepare_model(models[name])) / "tokenizer.json"
        try:
            return Path(demo_models.prepare_tokenizer(name)) / "tokenizer.json"
        except demo_models.NpmMissing as error:
            pytest.skip(str(error))

    return find


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``figure(line)``: show a measured figure after the test run, passed or failed."""
    return lambda line: request.node.user_properties.append((FIGURE, line))


# Integration tests that start no cluster, engine or server: they may run beside those that do.
_LIGHT = (
    *("test_align.py", "test_align_several.py", "test_page_browser.py", "test_readers.py", "test_interrupt.py"),
    *("test_eval_tasks.py", "test_ranks.py", "test_report_browser.py", "test_train_kill.py"),
    *("test_chain.py", "test_chain_losses.py", "test_several_teachers.py"),
)


class _Scheduling(LoadScopeScheduling):
    """Integration tests one after the other, since they need cores and ports; light ones and unit tests beside them."""

    def _split_scope(self, nodeid: str) -> str:
        return "integration" if _rank(nodeid) == 0 else nodeid.split("::", 1)[0]


def _rank(nodeid: str) -> int:
    """0: integration tests one after the other; 1: light ones; 2: unit tests."""
    file = nodeid.split("::", 1)[0]
    if not file.startswith("tests/integration/"):
        return 2
    return 1 if file.endswith(_LIGHT) else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In random order too the longest starts first, or one core would wait for it at the end."""
    items.sort(key=lambda item: _rank(item.nodeid))
    random.seed()  # the seed of the order is not one of the tests': two workers would draw the same


@pytest.hookimpl(optionalhook=True)  # pytest -p no:xdist works too
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """What ``-n 2`` runs where."""
    return _Scheduling(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Print what tests measured and, as the last lines, what could not be tested here."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    properties = [found for report in reports if report.when == "call" for found in report.user_properties]
    _section(terminalreporter, "figures", [str(text) for name, text in properties if name == FIGURE])
    yield
    skipped = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    missing = sorted(reason for reason in skipped if "install" in reason or "could not import" in reason)
    lines = [f"{skipped[reason]} skipped: {reason.removeprefix('Skipped: ')}" for reason in missing]
    _section(terminalreporter, "NOT TESTED, since something is missing here", lines)


def _section(reporter: pytest.TerminalReporter, title: str, lines: list[str]) -> None:
    if lines:
        reporter.section(title)
    for line in lines:
        reporter.write_line(line)
