"""The verbs of xtoken, as benchmarks run them: in a process of their own, with ``--json``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def xtoken(words: Sequence[object], threads: int = 2) -> dict[str, Any]:
    """Run a verb; its figures. Says on stderr what took how long.

    Args:
        words: the verb and what follows it.
        threads: of torch.

    Raises:
        SystemExit: it failed; with what it said.
    """
    began, said = time.monotonic(), [str(word) for word in words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "xtoken", *said, "--json", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"xtoken {' '.join(said)} failed:\n{done.stdout}\n{done.stderr[-2000:]}")
    print(f"{said[0]}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
