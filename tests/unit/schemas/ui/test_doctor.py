"""xtoken doctor: what is there and what is missing, also where packages are broken and folders are closed."""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xtoken import cli
from xtoken.schemas.ui import doctor

ROOT = Path(cli.__file__).resolve().parent
RUNNER = CliRunner()


def run(*words: str, home: Path, path: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """``python -m xtoken doctor``; modules in the folder ``path`` come before the installed ones."""
    paths = os.pathsep.join([path, str(ROOT / ".dev")] if path else [str(ROOT / ".dev")])
    given = {**os.environ, "HOME": str(home), "PYTHONPATH": paths, **env}
    command = [sys.executable, "-m", "xtoken", "doctor", *words]
    return subprocess.run(command, cwd=home, env=given, capture_output=True, text=True)


def test_it_says_what_is_here() -> None:
    result = RUNNER.invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    versions = {row["package"]: row["version"] for row in found["packages"]}
    for name in ("torch", "transformers", "tokenizers", "pyarrow", "duckdb", "numba"):
        assert versions[name] == version(name)
    assert found["problems"] == []
    assert found["hub"] == "not asked; --online asks it"
    assert found["cpu_threads"] >= 1
    assert found["memory_bytes"] > 1 << 28
    assert {row["set_by"]: row["folder"] for row in found["folders"]}["XTOKEN_CACHE"] == os.environ["XTOKEN_CACHE"]
    people = RUNNER.invoke(cli.app, ["doctor"])
    assert people.exit_code == 0
    assert "pyarrow" in people.stdout


def test_every_extra_says_what_it_is_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys()


def test_neither_torch_nor_an_engine_is_imported(figure: Callable[[str], None]) -> None:
    code = "import sys; from xtoken.schemas.ui import doctor; doctor.examine(); print(*sys.modules)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    figure(f"xtoken doctor: its figures in {time.monotonic() - began:.1f} s, Python's start included")
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "xtoken" in loaded
    assert not loaded & {"torch", "vllm", "ray", "transformers", "pyarrow"}


def broken(folder: Path, name: str) -> str:
    """A folder with a package that cannot be imported."""
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / f"{name}.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    return str(folder / "broken")


def test_a_broken_torch_hinders_nothing(tmp_path: Path) -> None:
    done = run("--json", home=tmp_path, path=broken(tmp_path, "torch"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []


def test_a_broken_torch_is_found_when_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", broken(tmp_path, "torch"))
    found = doctor.examine(imports=["torch"])
    (row,) = [row for row in found["packages"] if row["package"] == "torch"]
    assert row["state"] == "broken: OSError: libcudart.so.12: cannot open shared object file"
    (problem,) = found["problems"]
    assert problem.startswith("torch ")
    assert problem.endswith("pip install --force-reinstall 'torch'")


def test_every_package_that_is_shown_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(doctor, "_import_error", asked.append)
    assert RUNNER.invoke(cli.app, ["doctor", "--json", "--imports"]).exit_code == 0
    assert {"torch", "duckdb", "ray"} <= set(asked)


def test_a_package_that_the_command_line_stands_on(tmp_path: Path) -> None:
    path = broken(tmp_path, "pyarrow")
    done = run(home=tmp_path, path=path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "pyarrow" in done.stderr
    assert "error: the command line cannot be imported: OSError: libcudart.so.12" in done.stderr
    assert "pip install --force-reinstall 'pyarrow'" in done.stderr


def test_what_is_missing_or_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["duckdb>=2.0", "nowhere-to-be-found>=1", "numpy>=999; python_version > '3'", "peft>=999; extra == 'lora'"]
    monkeypatch.setattr(doctor, "requires", lambda _: asked)
    result = RUNNER.invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert "nowhere-to-be-found is not installed: pip install 'nowhere-to-be-found>=1'" in found["problems"]
    assert any(line.startswith("numpy ") and "is not >=999" in line for line in found["problems"])
    assert len(found["problems"]) == 2
    assert found["extras"] == [
        {"extra": "lora", "state": "without peft: pip install 'xtoken[lora]'", "for": doctor.EXTRAS["lora"]}
    ]


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    env = {"HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": "", "XTOKEN_CACHE": ""}
    env |= {"PYTHONPATH": str(ROOT / ".dev")}
    command = [sys.executable, "-m", "xtoken", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be written: caches of this run go to" in done.stderr
    folders = {row["set_by"]: row for row in json.loads(done.stdout)["folders"]}
    assert folders["XDG_CACHE_HOME"]["writable"]
    assert folders["XDG_CACHE_HOME"]["folder"].startswith(str(tmp_path / "tmp"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    found = doctor.examine()
    assert f"{tmp_path}/file/hub (models of the hub) cannot be written; set HF_HUB_CACHE to another" in found["notes"]
    assert found["problems"] == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo '0, NVIDIA H200, 570.86.15, 143771 MiB, 4 MiB'", "570.86.15"),
        ("echo 'No devices were found'; exit 6", "none: nvidia-smi says 'No devices were found'"),
        ("exit 9", "none: nvidia-smi says 'it lists no GPU'"),
    ],
)
def test_gpus(body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "torch_cuda", lambda: None)
    found = doctor.examine()
    assert found["gpu_driver"] == said
    assert [gpu["name"] for gpu in found["gpus"]] == (["NVIDIA H200"] if "H200" in body else [])
    assert any("built for CPUs, so the GPUs are not used" in note for note in found["notes"]) == ("H200" in body)


def test_the_hub_is_asked_only_when_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.examine()["hub"] == "not asked; --online asks it"
    said = doctor.examine(online=True)["hub"]
    assert said.startswith("http://127.0.0.1:9 does not answer: ")
    assert said.endswith("(HF_HUB_OFFLINE is set: nothing asks it)")


@pytest.mark.parametrize(
    ("there", "specifier", "met"),
    [
        ("2.13.0+cpu", ">=2.8", True),
        ("4.56", ">=4.56,<6", True),
        ("6.0.0", ">=4.56,<6", False),
        ("0.9", ">=0.16", False),
        ("1.10", ">=1.9", True),
        ("2.0", "==2.0.0", True),
        ("2.1.3", "~=2.1.1", True),
        ("2.2", "~=2.1.1", False),
        ("3.0.dev1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(there: str, specifier: str, met: bool) -> None:
    assert doctor.fits(there, specifier) is met


def test_the_cuda_of_torch_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('broken')\n")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.8'\ncuda: Optional[str] = '12.8'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert doctor.torch_cuda() == "12.8"
