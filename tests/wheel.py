"""The wheel and the sdist as users get them: built, installed in an environment of its own, used outside the checkout.

    make wheel                     # two minutes; .ci/run does it, too
    python tests/wheel.py --keep   # leaves the folder and says where it is

The environment sees the libraries of the one that runs this, but not its xtoken: nothing large is downloaded. From
the package index come hatchling, and PyPI's ``trainer`` and ``trl``, beside which our wheel must be able to lie.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution
from itertools import combinations
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
TEACHER = ROOT / ".cache" / "models" / "smollm2-135m"
NEIGHBOURS = ("trainer", "trl")
THEIR_NEEDS = ("coqpit",)  # of trainer, and in no environment of ours
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


class Wheel:
    """A folder outside the checkout with what was built, an environment, and a place to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.dist, self.work = folder, folder / "dist", folder / "work"
        self.python = folder / "venv" / "bin" / "python"
        self.work.mkdir()

    def run(self, command: Sequence[object], cwd: Path, **env: str) -> str:
        """Standard output of a command that must succeed, in an environment that leads nowhere else."""
        given = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        given |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", **env}
        given["PATH"] = f"{self.python.parent}{os.pathsep}{given['PATH']}"
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=cwd, env=given, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"FAILED with {done.returncode}: {' '.join(words)}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def xtoken(self, *words: object) -> dict[str, Any]:
        """Figures of a command, run by the installed script."""
        return dict(json.loads(self.run([self.python.parent / "xtoken", *words, "--json"], self.work)))

    def build(self) -> str:
        tools = self.folder / "tools"
        self.run([*PIP, "install", "--target", tools, "hatchling"], self.work)
        hatchling = [sys.executable, "-m", "hatchling", "build", "-d"]
        self.run([*hatchling, self.dist], ROOT, PYTHONPATH=str(tools))
        with tarfile.open(self.dist / f"xtoken-{VERSION}.tar.gz") as archive:
            archive.extractall(self.folder / "sdist", filter="data")
        again = self.folder / "again"
        source = self.folder / "sdist" / f"xtoken-{VERSION}"
        self.run([*hatchling, again, "-t", "wheel"], source, PYTHONPATH=str(tools))
        first, second = (contents(folder / self.name) for folder in (self.dist, again))
        differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
        expect(not differing, f"the wheel of the sdist differs in {differing[:9]}")
        tops = {name.split("/")[0] for name in first}
        expect(tops == {"xtoken", f"xtoken-{VERSION}.dist-info"}, f"the wheel installs {sorted(tops)}")
        expect("xtoken/py.typed" in first, "the wheel is without py.typed")
        absent = tracked() - first.keys()
        expect(not absent, f"the wheel is without {sorted(absent)[:9]}")
        return f"{self.name}, {len(first)} files; the sdist builds the same wheel, byte for byte"

    @property
    def name(self) -> str:
        return f"xtoken-{VERSION}-py3-none-any.whl"

    def install(self) -> str:
        self.run([sys.executable, "-m", "venv", "--without-pip", self.folder / "venv"], self.work)
        site = Path(
            self.run([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], self.work).strip()
        )
        # a folder named in a .pth is searched, but its own .pth files, which lead to the checkout, are not read
        (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
        pip = [*PIP, "--python", self.python, "install", "--no-deps"]
        self.run([*pip, "--no-index", self.dist / self.name], self.work)
        # --ignore-installed: the environment whose libraries are searched has a trl of its own
        self.run([*pip, "--ignore-installed", *NEIGHBOURS, *THEIR_NEEDS], self.work)
        code = "import xtoken.cli, xtoken.trainer, trainer, trl; print(xtoken.__file__, trainer.__file__, trl.__file__)"
        places = self.run([self.python, "-c", code], self.work).split()[-3:]
        expect(all(Path(place).is_relative_to(site) for place in places), f"imported from {places}")
        found = {name: record(site, name) for name in ("xtoken", *NEIGHBOURS)}
        for one, other in combinations(found, 2):
            shared = sorted(found[one] & found[other])
            expect(not shared, f"{one} and {other} both install {shared[:9]}")
        sizes = ", ".join(f"{name} {len(files)} files" for name, files in found.items())
        return f"xtoken, trainer and trl import side by side and share no file ({sizes})"

    def typed(self) -> str:
        (self.work / "user.py").write_text(
            "from xtoken.schemas.errors import XtokenError\nreveal_type(XtokenError.exit_code)\n"
        )
        mypy = [sys.executable, "-m", "mypy", "--python-executable", self.python, "--cache-dir", self.folder / "mypy"]
        said = self.run([*mypy, "user.py"], self.work)
        expect('Revealed type is "int"' in said or 'Revealed type is "builtins.int"' in said, said)
        return "mypy reads its types"

    def start(self) -> str:
        expect(self.run([self.python.parent / "xtoken", "--version"], self.work) == f"xtoken {VERSION}\n", "--version")
        expect("precompute" in self.run([self.python, "-m", "xtoken", "--help"], self.work), "python -m xtoken --help")
        script = self.run([self.python, "-c", "import xtoken.cli; print(xtoken.cli.__file__)"], self.work).strip()
        for cli in (script, ROOT / "cli.py"):
            expect("precompute" in self.run([self.python, cli, "--help"], self.work), f"python {cli} --help")
        found = self.xtoken("doctor")
        expect(found["xtoken"] == VERSION, f"doctor says xtoken {found['xtoken']}")
        expect(found["problems"] == [], str(found["problems"]))
        return "xtoken, python -m xtoken, python cli.py and xtoken doctor start"

    def chain(self, name: str, *transport: str, train: bool) -> str:
        """A capture by the fake teacher, its targets, and a student of them; workers by processes or Ray."""
        capture, targets, run = (f"{name}-{part}" for part in ("capture", "targets", "run"))
        teacher = ("--teacher", "bytes", "--backend", "fake", "--k", "8", "--max-tokens", "64", "--shard-bytes", "2000")
        captured = self.xtoken("precompute", "corpus.jsonl", *teacher, "--out", capture, *transport)
        expect(len(list((self.work / capture / "data").iterdir())) > 1, str(captured))
        self.xtoken("verify", capture)
        words = [capture, "--student", "bytes", "--out", targets, "--for", "p-kl", *transport]
        self.xtoken("align", *words)
        said = f"{name}: {captured['tokens']} tokens captured and aligned"
        if not train:
            return said
        student = ("--from-scratch", "student.json", "--tokenizer", "bytes", "--device", "cpu")
        sizes = ("--steps", "2", "--step-tokens", "128", "--micro-tokens", "128", "--warmup", "1")
        trained = self.xtoken("train", targets, *student, "--loss", "p-kl", *sizes, "--out", run)
        expect(trained["steps"] == 2, str(trained))
        return f"{said}, a student trained"

    def real(self) -> str:
        if not TEACHER.is_dir():
            return "no real teacher: 'make models' prepares it"
        model = ("--teacher", TEACHER, "--limit", "4", "--max-tokens", "32", "--k", "16", "--device", "cpu")
        captured = self.xtoken("precompute", "corpus.jsonl", *model, "--out", "real-capture")
        self.xtoken("align", "real-capture", "--student", "bytes", "--out", "real-targets", "--for", "p-kl")
        return f"a real teacher: {captured['tokens']} tokens captured and aligned"


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def tracked() -> set[str]:
    """What git has of the package, under the names of the wheel; nothing where there is no git."""
    command = ["git", "ls-files", "__init__.py", "__main__.py", "cli.py", "py.typed", "pipeline", "trainer", "schemas"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {f"xtoken/{name}" for name in done.stdout.split("\n") if name and (ROOT / name).is_file()}


def record(site: Path, name: str) -> set[str]:
    """Files that a distribution installed into a folder says are its own."""
    (info,) = [path for path in site.glob("*.dist-info") if path.name.lower().startswith(f"{name}-")]
    return {os.path.normpath(site / str(file)) for file in Distribution.at(info).files or []}


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {otherwise}")


def write_inputs(work: Path) -> None:
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. "
    lines = [json.dumps({"text": f"{number}: {text * (1 + number % 5)}"}) for number in range(24)]
    (work / "corpus.jsonl").write_text("\n".join(lines))
    config = json.loads((ROOT / "examples" / "configs" / "bytes-llama-10m.json").read_text(encoding="utf-8"))
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    (work / "student.json").write_text(json.dumps(config | small | {"num_key_value_heads": 2, "head_dim": 32}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    keep = parser.parse_args().keep
    folder = Path(tempfile.mkdtemp(prefix="xtoken-wheel-"))
    try:
        wheel = Wheel(folder)
        write_inputs(wheel.work)
        local, ray = ("--workers", "2"), ("--ray", "local", "--workers", "2")
        for step in (
            wheel.build,
            wheel.install,
            wheel.typed,
            wheel.start,
            lambda: wheel.chain("processes", *local, train=True),
            lambda: wheel.chain("ray", *ray, train=False),
            wheel.real,
        ):
            began = time.monotonic()
            print(f"{step()} ({time.monotonic() - began:.0f} s)", flush=True)
    finally:
        if keep:
            print(f"left: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
