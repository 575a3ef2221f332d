"""The whole chain against a dense computation: full teacher rows, full W, full student rows, one chunk at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.store.reader import load_vocab
from xtoken.pipeline.tokens import load_tokenizer

TEXT = Path(cli.__file__).resolve().parent / "examples" / "data" / "moby-dick-held-out.jsonl"
K, MIN_P = 64, 0.003
# Nats per chunk: all that lies between the two is the codec's rounding to 1/32 nat, float32 and ties.
CLOSE = 2e-3


def xtoken(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*(str(word) for word in words), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def chunk_starts(student_end: list[int], teacher_end: list[int]) -> list[tuple[int, int]]:
    """First student and first teacher token of every chunk, eos against eos last."""
    shared = sorted(set(student_end[:-1]) & set(teacher_end[:-1]))
    firsts = [(student_end.index(byte) + 1, teacher_end.index(byte) + 1) for byte in shared]
    return [(0, 0), *firsts]


def dense_kl(logp_T: np.ndarray, p_S: np.ndarray, W: Any, moved: dict[int, int | None]) -> float:
    """P-KL of one chunk with REST, straight from its definition; W is a scipy-free list of (s, t, w) arrays."""
    likely = np.flatnonzero(np.exp(logp_T) >= MIN_P)
    kept = likely[np.lexsort((likely, -logp_T[likely]))][:K] if len(likely) else [logp_T.argmax()]
    q = np.bincount(W[1], W[2] * p_S[W[0]], len(logp_T))
    target: dict[int, float] = {}
    rest = 1 - float(np.exp(logp_T[kept]).sum())
    for t in kept:
        to = moved.get(int(t), int(t))
        if to is None:
            rest += float(np.exp(logp_T[t]))
        else:
            target[to] = target.get(to, 0.0) + float(np.exp(logp_T[t]))
    kl = sum(p * (np.log(p) - np.log(q[t])) for t, p in target.items())
    return float(kl + rest * (np.log(rest) - np.log(1 - q[list(target)].sum())))


@pytest.mark.engine
def test_stored_rows_give_the_kl_of_full_rows(
    gemma3_dir: Path, smollm2_dir: Path, tmp_path: Path, log_probabilities: Any
) -> None:
    text = json.loads(TEXT.read_text(encoding="utf-8"))["text"]
    mixed = "Zażółć gęślą jaźń; 1851 + 42 = 1893.\nfor x in range(10):\n    print(f'{x}')  # 🐋 鯨 кит"
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": one}) + "\n" for one in (text[:700].strip(), mixed)))
    xtoken("precompute", corpus, "--teacher", gemma3_dir, "--out", tmp_path / "c", "--k", K, "--min-p", MIN_P)
    xtoken("align", tmp_path / "c", "--student", smollm2_dir, "--out", tmp_path / "t", "--for", "p-kl")
    measured = xtoken("eval", smollm2_dir, "--targets", tmp_path / "t")

    student = load_tokenizer(str(smollm2_dir))
    rows = pq.read_table(tmp_path / "c" / "data").to_pylist()
    encoded = [student.encode(row["text"], complete=True) for row in rows]
    W = [
        pq.read_table(tmp_path / "t" / "w.parquet")[name].to_numpy() for name in ("student_id", "teacher_id", "weight")
    ]
    unreached = pq.read_table(tmp_path / "t" / "unreached.parquet").to_pydict()
    moved = dict(zip(unreached["teacher_id"], unreached["moved_to"], strict=True))
    bos, eos = load_vocab(str(tmp_path / "c")).info.bos_id, student.table.info.eos_id
    teacher_rows = log_probabilities(gemma3_dir, [[bos, *row["teacher_ids"]] for row in rows])
    student_rows = log_probabilities(smollm2_dir, [[eos, *one.ids.tolist()] for one in encoded])
    found = [
        dense_kl(logp_T[t], np.exp(logp_S[s]), W, moved)
        for row, one, logp_T, logp_S in zip(rows, encoded, teacher_rows, student_rows, strict=True)
        for s, t in chunk_starts(one.ends.tolist(), row["teacher_end"])
    ]
    assert measured["chunks"] == len(found)
    assert measured["kl"] == pytest.approx(np.mean(found), abs=CLOSE)
