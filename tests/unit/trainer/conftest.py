"""A toy pair of vocabularies, target folders written from it with pyarrow, and a tiny random student."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.manifest import Part, TargetManifest, TeacherInfo, TokenizerInfo, part_name
from xtoken.schemas.tables import CHAT_TARGETS, LEAN_TARGETS, VOCAB, W, target_columns, targets
from xtoken.schemas.target_form import TargetForm, TokenCodes
from xtoken.trainer.losses.base import LossSetup, ProjectionArrays, VocabArrays

V, U = 24, 30
BOS, EOS = 0, 1
BYTES = [b"", b"", *(b" " * (i % 2) + bytes([97 + i]) for i in range(V - 2))]
STUDENT = TokenizerInfo(name="toy-student", hash="a" * 64, kind="bytes", size=V, adds_bos=True, bos_id=BOS, eos_id=EOS)
TEACHER = TokenizerInfo(name="toy-teacher", hash="b" * 64, kind="byte-level", size=U, adds_bos=True, bos_id=0)

CHAT = ChatInfo(template="f" * 64, date="2026-01-02T00:00:00", learn=["assistant", "call", "stop"], stop_token=EOS)
CODES = TokenCodes(*(np.random.default_rng(9).permutation(size).astype(np.int32) for size in (U, V)))


@dataclass
class Pair:
    """A random W: most rows exact, some of pieces, two empty; teacher tokens 26 and up are not reached."""

    weight_VU: np.ndarray = field(default_factory=lambda: np.zeros((V, U)))

    def __post_init__(self) -> None:
        rng = np.random.default_rng(5)
        for s in range(2, V):
            pieces = 1 if s < 16 else int(rng.integers(2, 4))
            columns = [s] if pieces == 1 else rng.choice(26, pieces, replace=False)
            share = 0.9 * 0.1 ** np.arange(pieces)
            self.weight_VU[s, columns] = share / share.sum()

    @property
    def reached(self) -> np.ndarray:
        return np.flatnonzero(self.weight_VU.sum(0) > 0)

    @property
    def arrays(self) -> ProjectionArrays:
        s, t = np.nonzero(self.weight_VU)
        weight = self.weight_VU[s, t].astype(np.float32)
        common = (weight == 1) & (s % 4 != 0)
        return ProjectionArrays(s.astype(np.int32), t.astype(np.int32), weight, common, common)

    @property
    def vocab(self) -> VocabArrays:
        return VocabArrays.of(BYTES, [None if i >= 2 else "special" for i in range(V)])

    def table(self) -> pa.Table:
        w = self.arrays
        kind = np.where(w.weight == 1, "exact", "pieces")
        return pa.Table.from_arrays(
            [w.student_id, w.teacher_id, w.weight, pa.array(kind), pa.array(w.common)], schema=W
        )

    def setup(self, *, learn_w: bool = False, **options: Any) -> LossSetup:
        device = torch.device("cpu")
        return LossSetup(self.arrays, self.vocab, V, U, device, LossOptions(**options), learn_w=learn_w)

    def cells(self, rng: np.random.Generator, ids: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray, float]:
        """``kept`` of ``ids``, most probable first, their log-probabilities, and the log of REST."""
        p = rng.dirichlet(np.full(len(ids), 0.4))
        order = np.argsort(-p, kind="stable")[:kept]
        return ids[order].astype(np.int32), np.log(p[order]), float(np.log1p(-p[order].sum()))


def _sample(pair: Pair, rng: np.random.Generator, name: str, length: int) -> dict[str, Any]:
    """A sample of one-byte tokens; every third token is the second of its chunk; the last chunk has no row.

    What a column holds follows from its axis and name: enough for batching and for every loss to run, no more.
    """
    ids = rng.integers(2, V, length).astype(np.int32)
    ends = np.array([i + 1 for i in range(length) if i % 3 != 1 or i == length - 1], np.int32)
    known = {axis: np.arange(size) < size - 1 for axis, size in (("chunk", len(ends)), ("token", length))}
    return _columns(pair, rng, name, ids, ends, known)


def _chat_sample(pair: Pair, rng: np.random.Generator, name: str, length: int) -> dict[str, Any]:
    """Turns: what is not taught is a gap, and so is at places what is, by itself or joined to it; some have no tokens.

    Chunks have one token or two, and only taught tokens have targets of their own.
    """
    ids = rng.integers(2, V, length).astype(np.int32)
    mask = np.random.default_rng([length, *name.encode()])  # not of ``rng``: the same whatever the losses are
    learn = np.zeros(length, np.bool_)
    at = int(mask.integers(1, 3))
    while at < length:
        learn[at : at + int(mask.integers(1, 7))] = True
        at += 6 + int(mask.integers(1, 3))
    ends, has = list[int](), list[bool]()
    for low, high in pairwise([0, *(np.flatnonzero(np.diff(learn)) + 1).tolist(), length]):
        if not learn[low]:
            ends, has = [*ends, high], [*has, False]
        elif (what := mask.random()) < 0.25:  # taught, and the teacher has other text there
            ends, has = ([*ends[:-1], high], has) if what < 0.12 else ([*ends, high], [*has, False])
        else:
            at = low + int(mask.integers(0, high - low)) if mask.random() < 0.3 else -1
            while low < high:
                if low == at:
                    ends, has = [*ends, low], [*has, False]
                low = min(high, low + int(mask.integers(1, 3)))
                ends, has = [*ends, low], [*has, True]
    known = {"chunk": np.array(has), "token": learn}
    return {"learn": learn} | _columns(pair, rng, name, ids, np.array(ends, np.int32), known)


def _columns(
    pair: Pair, rng: np.random.Generator, name: str, ids: np.ndarray, ends: np.ndarray, known: dict[str, np.ndarray]
) -> dict[str, Any]:
    """A sample's; ``known``: which chunks and tokens have targets."""
    length, no_row = len(ids), np.where(known["chunk"], np.float32(0), np.float32(np.nan))
    sample: dict[str, Any] = {
        "sample_id": name,
        "teacher_entropy": float(rng.uniform(1, 3)),
        "teacher_top1": float(rng.uniform(0.2, 0.8)),
        "student_ids": ids,
        "student_end": np.arange(1, length + 1, dtype=np.int32),
        "chunk_student_end": ends,
        "chunk_teacher_end": np.arange(1, len(ends) + 1, dtype=np.int32),
        "teacher_logprob": (-rng.uniform(1, 3, len(ends)) + no_row).astype(np.float32),
    }
    columns = target_columns(LOSSES, base=False)
    for count, axis in [column for column in columns if column.name.endswith("_count")]:
        sample |= _entries(pair, rng, count, known[axis], {name for name, of in columns if of == count})
    for column in ("factor_logprob", "alm_space_logprob"):
        sample[column] = (-rng.uniform(0.1, 3, len(ends)) + no_row).astype(np.float32)
    return sample


def _entries(pair: Pair, rng: np.random.Generator, count: str, has: np.ndarray, names: set[str]) -> dict[str, Any]:
    """The columns that ``count`` counts, for chunks or tokens that have some or none."""
    stem = count.removesuffix("_count")
    w = pair.arrays
    choices = {"hkl_common": w.student_id[w.common], "gold": w.student_id[w.exact]}
    choices |= dict.fromkeys(("pkl", "mined"), pair.reached)
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32), -np.inf
    ids_of, kept = choices.get(stem, np.arange(2, V)), 3 if stem == "child" else 6
    cells = [pair.cells(rng, ids_of, kept) if one else nothing for one in has]
    groups = 3 * int(has.sum())
    low = rng.integers(0, V - 4, groups)
    found = {
        count: np.array([len(ids) for ids, _, _ in cells], np.int32),
        f"{stem}_ids": _joined([ids for ids, _, _ in cells], np.int32),
        f"{stem}_logprob": _joined([logprob for _, logprob, _ in cells], np.float32),
        f"{stem}_rest_logprob": np.array([rest for _, _, rest in cells], np.float32),
        "child_low": low.astype(np.int32),
        "child_high": (low + rng.integers(1, 3, groups)).astype(np.int32),
    }
    return {name: value for name, value in found.items() if name in {count, f"{stem}_rest_logprob", *names}}


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)


def write_targets(
    root: Path,
    pair: Pair,
    lengths: list[list[int]],
    losses: tuple[str, ...] = ("p-kl", "h-kl"),
    seed: int = 0,
    step: float | None = None,
    chat: ChatInfo | None = None,
    **manifest: Any,
) -> str:
    """A target folder with one part per list of sample lengths, two samples per row group; more for its manifest.

    With ``step`` the same samples as version 6 of the schema holds them; with ``chat`` and a step conversations.
    """
    version = CHAT_TARGETS if chat is not None else 3 if step is None else LEAN_TARGETS
    form = TargetForm(losses, version, step or 0.0, CODES)
    rng = np.random.default_rng(seed)
    (root / "data").mkdir(parents=True)
    schema, parts, sample = targets(losses, chat=form.chat), [], _chat_sample if form.chat else _sample
    for index, sizes in enumerate(lengths):
        rows = [sample(pair, rng, f"doc{index}#{i}", size) for i, size in enumerate(sizes)]
        table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)
        path = root / "data" / part_name(index)
        stored = pa.Table.from_batches([form.stored_batch(batch) for batch in table.to_batches()], form.schema)
        pq.write_table(stored, path, row_group_size=2)
        parts.append(_part(index, path, sizes, sum(len(row["chunk_student_end"]) for row in rows)))
    vocab = {"token_id": range(V), "bytes": BYTES, "role": ["bos", "eos", *[None] * (V - 2)]}
    vocab_table = pa.table({**vocab, "byte_fallback": [False] * V}, schema=VOCAB)
    files = {"w.parquet": pair.table(), "student_vocab.parquet": vocab_table}
    if step is not None:
        files["codes.parquet"] = CODES.table()
        manifest |= {"schema_version": version, "step": step, "chat": chat}
    for name, table in files.items():
        pq.write_table(table, root / name)
    sums = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in files}
    (root / "manifest.json").write_text(_manifest(sums, parts, losses).model_copy(update=manifest).model_dump_json())
    return str(root)


def _part(index: int, path: Path, sizes: list[int], chunks: int) -> Part:
    data = path.read_bytes()
    return Part(
        index=index,
        samples=len(sizes),
        tokens=sum(sizes),
        rows=0,
        entries=chunks,
        text_bytes=sum(sizes),
        file_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _manifest(files: dict[str, str], parts: list[Part], losses: tuple[str, ...]) -> TargetManifest:
    teacher = TeacherInfo(
        model="toy",
        backend="fake",
        vocab_rows=U,
        context=64,
        dtype="float32",
        head_dtype="float32",
        device="cpu",
        capture_path="fake",
        engine_version="1",
    )
    return TargetManifest(
        xtoken_version="0",
        files=files,
        parts=parts,
        capture_hash="c" * 64,
        teacher=teacher,
        teacher_tokenizer=TEACHER,
        student=STUDENT,
        w_hash="d" * 64,
        losses=list(losses),
        unreached="prefix",
        run_hash="e" * 64,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pair() -> Pair:
    """The toy pair of vocabularies."""
    return Pair()


@pytest.fixture
def student_info() -> TokenizerInfo:
    """The toy student's tokenizer."""
    return STUDENT


@pytest.fixture
def make_targets(tmp_path: Path, pair: Pair) -> Callable[..., str]:
    """``make_targets(lengths, losses=..., name=...)``: write a target folder, return its path."""

    def make(lengths: list[list[int]], name: str = "targets", **options: Any) -> str:
        return write_targets(tmp_path / name, pair, lengths, **options)

    return make


@pytest.fixture
def chat_info() -> ChatInfo:
    """How the student's side of the toy conversations was written."""
    return CHAT


@pytest.fixture
def student_dir(tmp_path: Path) -> str:
    """A tiny random Llama whose head is wider than the toy vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V + 8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    folder = tmp_path / "student"
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return str(folder)
