"""How far a transplant carries before any training: bits per byte of a model under other tokenizers, by init.

    python -m benchmarks.transplant TOKENIZER

SmolLM2-135M under TOKENIZER (a folder, such as Llama-2's) with ``--init fvt`` and ``random``, and under the first
16,000 merges of its own, on examples/data/other-kinds.jsonl: code, a licence, a README.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.machine import machine, machine_line
from benchmarks.transfer import DATA, MODEL, xtoken

RESULTS = Path(__file__).parent / "results"
TEXT = str(DATA / "other-kinds.jsonl")


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    tokenizer = parser.parse_args().tokenizer
    cases = {
        "fvt": ["--tokenizer", tokenizer],
        "random": ["--tokenizer", tokenizer, "--init", "random"],
        "--keep-merges 16000": ["--keep-merges", "16000"],
    }
    found = {"itself": measured(str(MODEL))}
    with tempfile.TemporaryDirectory() as work:
        for at, (name, words) in enumerate(cases.items()):
            xtoken(["transplant", str(MODEL), *words, "--out", f"{work}/{at}"])
            found[name] = measured(f"{work}/{at}")
    result = {"machine": machine(), "tokenizer": Path(tokenizer).name, "bits_per_byte": found}
    lines = [
        "# A transplant before training",
        "",
        f"{machine_line()}.",
        f"SmolLM2-135M, {result['tokenizer']}'s tokens.",
        "",
    ]
    lines += ["| model | bits per byte |", "|---|---|", *(f"| {name} | {bits:.3f} |" for name, bits in found.items())]
    (RESULTS / "transplant.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "transplant.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def measured(model: str) -> float:
    """Bits per byte."""
    bits: float = xtoken(["eval", model, "--text", TEXT, "--id-field", "id", "--max-tokens", "512"])["bits_per_byte"]
    return bits


if __name__ == "__main__":
    main()
