"""Whole rounds of tests in random order while every core is kept busy: what passes only on an idle machine falls.

``make soak`` runs the unit tests three times and the integration tests once. ``make soak ROUNDS=tests/unit:SEED``
repeats one round.
"""

import os
import random
import shlex
import subprocess
import sys

BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"
PYTEST = (
    *("-m", "pytest", "-x", "-n", "2", "--no-loadscope-reorder", "-p", "randomly", "--randomly-dont-reset-seed"),
    *("--hypothesis-profile=other", "--timeout=3600"),
)


def main(rounds: list[str]) -> int:
    """Run ``rounds``, each FOLDER or FOLDER:SEED; 1 at the first that fails."""
    load = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 2)]
    try:
        return next((1 for number, name in enumerate(rounds, 1) if not _passes(name, f"{number} of {len(rounds)}")), 0)
    finally:
        for process in load:
            process.kill()


def _passes(name: str, place: str) -> bool:
    folder, _, seed = name.partition(":")
    seed = seed or str(random.SystemRandom().getrandbits(32))
    command = [sys.executable, *PYTEST, f"--randomly-seed={seed}", folder]
    print(f"round {place}: {shlex.join(command)}", flush=True)
    passed = subprocess.run(command, check=False).returncode == 0
    if not passed:
        print(f"round {place} failed; repeat it with: make soak ROUNDS={folder}:{seed}", flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
