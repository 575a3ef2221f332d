"""Write the golden runs that a release began and that were killed half-way: ``make_runs.py`` (see README.md).

For release 0.5.0: ``PYTHONPATH=CHECKOUT_OF_2583048 python tests/golden/make_runs.py``. Every run works in one folder
with relative paths, so that no record names a machine: a capture, targets of the golden capture ``v4-topk`` and a
training run on the golden targets ``v4-targets``. A run is killed as soon as its first parts or checkpoints are there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMANDS = {
    "capture": "precompute corpus.jsonl --teacher tiny --backend fake --max-tokens 64 --shard-bytes 120 --k 8 "
    "--temperatures 2 --student bytes --text-field body --id-field key",
    "targets": "align v4-topk --student bytes --for p-kl,alm --tau 1 --entries 6",
    "run": "train v4-targets --from-scratch student/config.json --tokenizer bytes --loss p-kl --steps 40 "
    "--step-tokens 64 --micro-tokens 64 --max-tokens 128 --device cpu --save-every 2 --keep 1 --warmup 2 "
    "--seed 3 --lr 1e-3",
}
# What shows that a run is half done.
HALF = {"capture": "commits/part-00002.json", "targets": "commits/part-00000.json", "run": "checkpoints/step-000004"}
STUDENT = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 259,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
TEXT = "The river runs past the old mill, and {} boats wait for rain; naïve Leser zählen {} Brücken. "
# Before 0.6 the package's parts were imported without its name.
MAIN = """import sys
sys.argv = sys.argv[1:]
try: from cli import app
except ImportError: from xtoken.cli import app
app()
"""
# Of the machine that ran it, and nothing that a run goes on from.
MACHINE = (".lock", ".model.rehearsal")


def furnish() -> None:
    """What the runs read, in the working folder."""
    lines = (json.dumps({"key": f"d{i}", "body": TEXT.format(i, i * i)}) for i in range(24))
    Path("corpus.jsonl").write_text("".join(f"{line}\n" for line in lines))
    Path("student").mkdir()
    Path("student/config.json").write_text(json.dumps(STUDENT, indent=1) + "\n")
    for name in ("tiny", "v4-topk", "v4-targets"):
        shutil.copytree(HERE / "captures" / name, name)


def begin(name: str) -> bool:
    """Start a run and kill it and its workers half-way; False when it ended first."""
    shutil.rmtree(name, ignore_errors=True)
    words = ["xtoken", *COMMANDS[name].split(), "--out", name, "--quiet"]
    process = subprocess.Popen([sys.executable, "-c", MAIN, *words], start_new_session=True)
    while process.poll() is None and not Path(name, HALF[name]).exists():
        time.sleep(0.0005)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return not ended


def main() -> None:
    """Write all of them."""
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        furnish()
        for name in COMMANDS:
            while not begin(name):
                print(f"{name}: it ended before it was killed; once more")
        shutil.rmtree(HERE / "runs", ignore_errors=True)
        for name in (*COMMANDS, "student", "corpus.jsonl"):
            path, to = Path(name), HERE / "runs" / name
            to.parent.mkdir(exist_ok=True)
            shutil.copytree(path, to, ignore=shutil.ignore_patterns(*MACHINE)) if path.is_dir() else shutil.copy(
                path, to
            )
        os.chdir(HERE)


if __name__ == "__main__":
    main()
