"""Losses through the whole chain against dense computations: full teacher rows, full student rows, byte by byte.

What the trainer takes of all samples in one step must be what the definitions give when they are applied to the
models' own forward passes.
"""

import json
from bisect import bisect_left
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.project import Projection, build_w
from xtoken.pipeline.store.reader import load_vocab
from xtoken.pipeline.tokens import TextTokenizer, TokenTable, load_tokenizer
from xtoken.schemas.configs.train import LossOptions
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.samples import context_token
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import LossSetup
from xtoken.trainer.objective import Student
from xtoken.trainer.score import measure
from xtoken.trainer.student.model import load_student

TEXT = Path(cli.__file__).resolve().parent / "examples" / "data" / "moby-dick-held-out.jsonl"
MIXED = "Zażółć gęślą jaźń; 1851 + 42 = 1893.\nfor x in range(10):\n    print(f'{x}')  # 🐋 鯨 кит"
K, MIN_P = 64, 0.003
# Nats per chunk: the codec rounds each log-probability to 1/32 nat; the child term is linear in what is rounded.
CLOSE = {"root": 3e-3, "interior": 3e-3, "child": 1e-2, "alm": 1e-5}


def xtoken(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, [*(str(word) for word in words), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class Words:
    """A student's text tokens by their bytes."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        table = tokenizer.table
        self.encoded, self.pieces = tokenizer.token_ids, table.pieces()
        self.by_bytes = {self.pieces[i]: i for i in range(table.size - 1, -1, -1) if self._is_text(table, i)}
        self._in_order = sorted(self.by_bytes)

    def _is_text(self, table: TokenTable, i: int) -> bool:
        return table.role[i] is None and bool(self.pieces[i])

    def first(self, text: bytes) -> int | None:
        """Of its own encoding; of bytes that are no text the longest that fits."""
        if not text:
            return None
        try:
            return self.encoded([text.decode()])[0][0]
        except UnicodeDecodeError:
            return next((self.by_bytes[text[:n]] for n in range(len(text), 0, -1) if text[:n] in self.by_bytes), None)

    def starting_with(self, text: bytes) -> list[int]:
        from_here = islice(self._in_order, bisect_left(self._in_order, text), None)
        return [self.by_bytes[data] for data in takewhile(lambda data: data.startswith(text), from_here)]


def kept_of(logp_T: np.ndarray) -> dict[int, float]:
    likely = np.flatnonzero(np.exp(logp_T) >= MIN_P)
    kept = likely[np.lexsort((likely, -logp_T[likely]))][:K] if len(likely) else np.array([logp_T.argmax()])
    return {int(t): float(np.exp(logp_T[t])) for t in kept}


def kl_with_rest(target: dict[int, float], p_S: np.ndarray) -> float:
    rest, q_rest = 1 - sum(target.values()), 1 - sum(p_S[u] for u in target)
    kl = sum(p * np.log(p / p_S[u]) for u, p in target.items())
    return float(kl + (rest * np.log(rest / q_rest) if rest > 1e-9 else 0.0))


def root(kept: dict[int, float], pieces: list[bytes], words: Words, specials: dict[int, int]) -> dict[int, float]:
    target: dict[int, float] = {}
    for t, p in kept.items():
        u = specials.get(t, words.first(pieces[t]) if pieces[t] else None)
        if u is not None:
            target[u] = target.get(u, 0.0) + p
    return target


def interior(kept: dict[int, float], done: bytes, pieces: list[bytes], words: Words) -> dict[int, float] | None:
    going = {t: p for t, p in kept.items() if pieces[t].startswith(done)}
    target: dict[int, float] = {}
    for t, p in going.items():
        u = words.first(pieces[t][len(done) :])
        if u is not None:
            target[u] = target.get(u, 0.0) + p / sum(going.values())
    return target or None


def child(kept: dict[int, float], realised: bytes, pieces: list[bytes], words: Words, p_S: np.ndarray) -> float:
    without = {pieces[t]: p for t, p in kept.items() if pieces[t] and pieces[t] not in words.by_bytes}
    groups: dict[bytes, float] = {}
    for text, p in without.items():
        shortest = min((other for other in without if text.startswith(other)), key=len)
        groups[shortest] = groups.get(shortest, 0.0) + p
    total = 0.0
    for text, mass in groups.items():
        if realised and text.startswith(realised) and text != realised:
            tokens = words.starting_with(text[len(realised) :])
            total -= mass * np.log(p_S[tokens].sum()) if tokens else 0.0
    return float(total)


def sample_terms(
    teacher_end: list[int], text: bytes, logp_T: np.ndarray, logp_S: np.ndarray, encoded: Any, names: Any
) -> tuple[dict[str, float], int]:
    """Sums over one sample of root, interior and child, and its chunks."""
    pieces, words, specials = names
    ends, terms, chunks = encoded.ends.tolist(), dict.fromkeys(("root", "interior", "child"), 0.0), 0
    starts = [0, *teacher_end[:-1]]
    pending = None
    for i, p_S in enumerate(np.exp(logp_S)):
        start = ends[i - 1] if i else 0
        if pending is not None:
            terms["child"] += child(*pending, pieces, words, p_S)
        j = max(k for k, begin in enumerate(starts) if begin <= start)  # of eos and the token before, eos
        kept = kept_of(logp_T[j])
        pending = None
        if starts[j] == start:
            terms["root"] += kl_with_rest(root(kept, pieces, words, specials), p_S)
            pending, chunks = (kept, text[start : ends[i]]), chunks + 1
        elif (target := interior(kept, text[starts[j] : start], pieces, words)) is not None:
            terms["interior"] += kl_with_rest(target, p_S)
    return terms, chunks


@pytest.fixture(scope="module")
def chain(gemma3_dir: Path, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of two short texts and targets for byte-prefix and alm."""
    folder = tmp_path_factory.mktemp("chain")
    prose = json.loads(TEXT.read_text(encoding="utf-8"))["text"][:500].strip()
    lines = [json.dumps({"text": one}) + "\n" for one in (prose, MIXED)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    words = ["--teacher", gemma3_dir, "--out", folder / "c", "--k", K, "--min-p", MIN_P]
    xtoken("precompute", folder / "corpus.jsonl", *words)
    xtoken("align", folder / "c", "--student", smollm2_dir, "--out", folder / "t", "--for", "byte-prefix,alm")
    return folder


def trainer_mean(targets: Targets, student: Student, name: str, **options: Any) -> tuple[float, int]:
    """Mean of a loss per valid chunk over all samples, as a training step takes it, and the chunks."""
    info, size = targets.manifest.student, student.vocabulary
    setup = LossSetup(
        targets.w.within(size), targets.vocab, size, targets.manifest.teacher_tokenizer.size, student.device,
        LossOptions(**options),
    )  # fmt: skip
    loss = open_loss(name, setup)
    layout = Layout(context_token(info), 4096, size, (loss,))
    batch = Loader(Sources([targets]), layout, step_tokens=100_000, micro_tokens=4096, seed=0).step()
    total = sum(float(measure(student, micro, [loss])[2]) for micro in batch.micros)
    return total / batch.chunks[0], batch.chunks[0]


@pytest.mark.engine
def test_byte_prefix_and_alm_are_their_definitions(
    chain: Path, gemma3_dir: Path, smollm2_dir: Path, log_probabilities: Any
) -> None:
    student, table = load_tokenizer(str(smollm2_dir)), load_vocab(str(chain / "c"))
    rows = pq.read_table(chain / "c" / "data").to_pylist()
    encoded = [student.encode(row["text"], complete=True) for row in rows]
    eos = student.table.info.eos_id
    assert eos is not None
    specials = {int(table.info.eos_id or 0): eos}
    teacher_rows = log_probabilities(gemma3_dir, [[table.info.bos_id, *row["teacher_ids"]] for row in rows])
    student_rows = log_probabilities(smollm2_dir, [[eos, *one.ids.tolist()] for one in encoded])
    names = table.pieces(), Words(student), specials
    sums, chunks, alm = dict.fromkeys(("root", "interior", "child"), 0.0), 0, 0.0
    for row, one, logp_T, logp_S in zip(rows, encoded, teacher_rows, student_rows, strict=True):
        terms, found = sample_terms(row["teacher_end"], row["text"].encode(), logp_T, logp_S, one, names)
        sums, chunks = {name: sums[name] + terms[name] for name in sums}, chunks + found
        alm += dense_alm(row, one, logp_T, logp_S)
    model = load_student(str(smollm2_dir), torch.device("cpu"), False).eval()
    ours, targets = Student(model, torch.device("cpu"), None, student.table.size), Targets(str(chain / "t"))
    for name, total in sums.items():
        mean, found = trainer_mean(targets, ours, "byte-prefix", prefix=[name])
        assert found == chunks
        assert mean == pytest.approx(total / chunks, abs=CLOSE[name]), name
        assert total > 0
    mean, _ = trainer_mean(targets, ours, "alm")
    assert mean == pytest.approx(alm / chunks, abs=CLOSE["alm"])


@pytest.mark.engine
def test_strict_and_mined_are_their_definitions(
    chain: Path, gemma3_dir: Path, smollm2_dir: Path, log_probabilities: Any
) -> None:
    xtoken("align", chain / "c", "--student", smollm2_dir, "--out", chain / "mined", "--for", "strict,mined")
    student, table = load_tokenizer(str(smollm2_dir)), load_vocab(str(chain / "c"))
    rows, eos = pq.read_table(chain / "c" / "data").to_pylist(), student.table.info.eos_id
    encoded = [student.encode(row["text"], complete=True) for row in rows]
    teacher_rows = log_probabilities(gemma3_dir, [[table.info.bos_id, *row["teacher_ids"]] for row in rows])
    student_rows = log_probabilities(smollm2_dir, [[eos, *one.ids.tolist()] for one in encoded])
    mine, w = student.table.by_bytes(), build_w(student.table, table, "mined")
    twin = {t: mine[data] for data, t in table.by_bytes().items() if data in mine}
    twin |= {t: s for s, t in zip(w.student_id.tolist(), w.teacher_id.tolist(), strict=True) if s == eos}
    assert len(w.student_id) == len(set(w.student_id.tolist())), "each row of W is one token"
    moved = dict(zip(w.unreached.tolist(), w.moved_to.tolist(), strict=True))
    strict, mined = [], []
    for row, one, logp_T, logp_S in zip(rows, encoded, teacher_rows, student_rows, strict=True):
        for first, length, at in one_to_one(one.ends.tolist(), row["teacher_end"]):
            if at is None:
                labels = one.ids[first : first + length]
                mined.append(-logp_S[np.arange(first, first + length), labels].sum())
                continue
            kept, p_S = kept_of(logp_T[at]), np.exp(logp_S[first])
            strict += dense_strict({twin[t]: p for t, p in kept.items() if t in twin}, p_S)
            mined.append(dense_mined(kept, p_S, w, moved))
    model = load_student(str(smollm2_dir), torch.device("cpu"), False).eval()
    ours, targets = Student(model, torch.device("cpu"), None, student.table.size), Targets(str(chain / "mined"))
    for name, terms in (("strict", strict), ("mined", mined)):
        mean, found = trainer_mean(targets, ours, name)
        assert found == len(terms) > 100
        assert mean == pytest.approx(np.mean(terms), abs=CLOSE["root"]), name
    reverse, _ = trainer_mean(targets, ours, "strict", kl="reverse")
    assert abs(reverse - np.mean(strict)) > 10 * CLOSE["root"]


def one_to_one(ends: list[int], teacher_ends: list[int]) -> list[tuple[int, int, int | None]]:
    """First student token, student tokens and, of one token on either side, the teacher's, of every chunk."""
    shared = sorted(set(ends[:-1]) & set(teacher_ends[:-1]))
    mine = [0, *(ends.index(byte) + 1 for byte in shared), len(ends)]
    theirs = [0, *(teacher_ends.index(byte) + 1 for byte in shared), len(teacher_ends)]
    spans = zip(pairwise(mine), pairwise(theirs), strict=True)
    return [(a, b - a, c if b - a == 1 == d - c else None) for (a, b), (c, d) in spans]


def dense_strict(inside: dict[int, float], p_S: np.ndarray) -> list[float]:
    """KL of one chunk over tokens of equal bytes, both sides renormalised; nothing where there is no choice."""
    if len(inside) < 2:
        return []
    p, q = np.array(list(inside.values())), p_S[list(inside)]
    p, q = p / p.sum(), q / q.sum()
    return [float((p * np.log(p / q)).sum())]


def dense_mined(kept: dict[int, float], p_S: np.ndarray, w: Projection, moved: dict[int, int]) -> float:
    """KL of one chunk to the student through W, unreached mass on its prefix, the tail mass as one cell."""
    q = np.bincount(w.teacher_id, p_S[w.student_id], w.teacher.size)
    target: dict[int, float] = {}
    for t, p in kept.items():
        if moved.get(t, t) >= 0:
            target[moved.get(t, t)] = target.get(moved.get(t, t), 0.0) + p
    rest, q_rest = 1 - sum(target.values()), 1 - q[list(target)].sum()
    return float(sum(p * np.log(p / q[t]) for t, p in target.items()) + rest * np.log(rest / q_rest))


def dense_alm(row: dict[str, Any], encoded: Any, logp_T: np.ndarray, logp_S: np.ndarray) -> float:
    """Binary KL of chunk likelihoods at tau_b = 100, from the realised tokens of both forward passes."""
    mine = logp_S[np.arange(len(encoded.ids)), encoded.ids]
    theirs = logp_T[np.arange(len(row["teacher_ids"])), row["teacher_ids"]]
    ends, teacher_ends = encoded.ends.tolist(), row["teacher_end"]
    shared = sorted(set(ends[:-1]) & set(teacher_ends[:-1]))
    s_cut = [0, *(ends.index(byte) + 1 for byte in shared), len(ends)]
    t_cut = [0, *(teacher_ends.index(byte) + 1 for byte in shared), len(teacher_ends)]
    total = 0.0
    for c in range(len(shared) + 1):
        a = theirs[t_cut[c] : t_cut[c + 1]].sum() / 100 - 1e-6
        b = mine[s_cut[c] : s_cut[c + 1]].sum() / 100 - 1e-6
        p = np.exp(a)
        total += p * (a - b) + (1 - p) * (np.log(-np.expm1(a)) - np.log(-np.expm1(b)))
    return float(total)
