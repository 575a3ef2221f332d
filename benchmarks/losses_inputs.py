"""Inputs of the loss benchmark: one text, teacher rows and student logits, captured and aligned as by the commands.

The text is prose with figures, code and other scripts between, so that some chunks have several tokens. Teacher rows
are Zipf's law over an order in which low ids (frequent tokens) come early; the realised token stands among the first.
Student logits are normal, scaled to the wanted largest probability.

Shapes: R teacher rows, U teacher vocabulary, P student positions, V student vocabulary.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xtoken.pipeline.align import align
from xtoken.pipeline.project.files import write_table
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.codecs.topk import STEP, encode
from xtoken.pipeline.store.codes import with_codes
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import committed, publish_part
from xtoken.pipeline.store.reader import MERGES_FILE, VOCAB_FILE
from xtoken.pipeline.store.writer import Sample, capture_batch, write_parquet
from xtoken.pipeline.teachers.logit_rows import RowReader
from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.losses import LOSSES
from xtoken.schemas.manifest import MANIFEST, CaptureManifest, CodecInfo, CorpusInfo, TeacherInfo, provenance
from xtoken.schemas.ui.progress import Silent

CAPTURE = open_codec(CodecInfo(k=64)).schema()

POSITIONS = 512
K = 64
TOP_1 = 0.4  # mean largest probability of a student row
ZIPF = 1.5  # exponent: the first of 150,000 has probability 0.38, the first 64 have 0.90
SHARED, FIRST = 16, 512  # so many rows share an order, but for the first places
PROSE = Path(__file__).parent.parent / "examples" / "data" / "moby-dick.jsonl"
MIXED = (
    " In 2023, 1,234,567 of 89,012,345 (3.14159%). Ряд слов по-русски, una mañana de otoño; 一些中文字词。\n"
    "for index in range(10):\n\tprint(index ** 2)\n"
)
SEED = 0
# strict runs sparse-kl's code and mined p-kl's, so neither has a case of its own
MEASURED = tuple(loss for loss in LOSSES if loss not in ("strict", "mined"))


def prepare(root: Path, student: Path, teacher: Path) -> None:
    """Write what the cases read under ``root``: ``cross/`` for two tokenizers, ``same/`` for the student's own twice.

    Each holds ``targets/`` and ``teacher.npy`` float32 [R, U]; ``student.npy`` is float32 [P, V], and
    ``tokenizer.json`` is the student's.
    """
    tokenizer, text = load_tokenizer(str(student)), _text()
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(student, root / "tokenizer.json")
    for name, side, losses in (
        ("cross", teacher, [loss for loss in MEASURED if loss != "sparse-kl"]),
        ("same", student, ["sparse-kl"]),
    ):
        folder = root / name
        folder.mkdir(parents=True)
        logits_RU = _capture(folder, load_tokenizer(str(side)), text)
        np.save(folder / "teacher.npy", logits_RU.numpy())
        align(
            AlignConfig(
                captures=[str(folder / "capture")], student=str(student), out=str(folder / "targets"), losses=losses
            ),
            Silent(),
        )
    label_P = torch.from_numpy(tokenizer.encode(text, complete=True).ids[:POSITIONS].astype(np.int64))
    np.save(root / "student.npy", student_logits(label_P, tokenizer.table.size).numpy())


def _text() -> str:
    prose = json.loads(PROSE.read_text().splitlines()[0])["text"]
    return "".join(prose[at : at + 600] + MIXED for at in range(0, 1800, 600))


def zipf_logits(target_R: Tensor, size: int) -> Tensor:
    """float32 [R, U]: log of Zipf's law, up to a constant, the realised token among the first eight."""
    random = torch.Generator().manual_seed(SEED)
    popular_U = -torch.log(torch.arange(size) + 100.0)
    value_U = -ZIPF * torch.log(torch.arange(size) + 1.0)
    logits_RU = torch.empty(len(target_R), size)
    place_R = torch.multinomial(0.5 ** torch.arange(8.0), len(target_R), replacement=True, generator=random)
    for row, (target, place) in enumerate(zip(target_R.tolist(), place_R.tolist(), strict=True)):
        if row % SHARED == 0:
            noise_U = -torch.empty(size).exponential_(generator=random).log()
            order_U = torch.argsort(popular_U + noise_U, descending=True)
        order_U[:FIRST] = order_U[:FIRST][torch.randperm(FIRST, generator=random)]
        at = int(torch.nonzero(order_U == target))
        order_U[[at, place]] = order_U[[place, at]]
        logits_RU[row, order_U] = value_U
    return logits_RU


def student_logits(label_P: Tensor, size: int) -> Tensor:
    """float32 [P, V]: normal, scaled to a mean largest probability of ``TOP_1``; half the time it is the label's."""
    random = torch.Generator().manual_seed(SEED + 1)
    logits_PV = torch.randn(len(label_P), size, generator=random)
    low, high = 1.0, 30.0
    while high - low > 1e-3:
        scale = (low + high) / 2
        top = torch.softmax(logits_PV[:64] * scale, dim=-1).amax(dim=-1).mean()
        low, high = (scale, high) if top < TOP_1 else (low, scale)
    logits_PV *= high
    for row in range(0, len(label_P), 2):
        best, label = int(logits_PV[row].argmax()), int(label_P[row])
        logits_PV[row, [best, label]] = logits_PV[row, [label, best]]
    return logits_PV


def _capture(folder: Path, tokenizer: TextTokenizer, text: str) -> Tensor:
    """Write ``capture/`` of one sample whose rows keep K entries; returns the whole rows as logits [R, U]."""
    encoded, table, root = tokenizer.encode(text, complete=True), tokenizer.table, str(folder / "capture")
    target_R = torch.from_numpy(encoded.ids[1:].astype(np.int64))
    logits_RU = zipf_logits(target_R, table.size)
    rows = RowReader(K, torch.from_numpy(np.flatnonzero(table.starts_with_space()))).read(logits_RU.clone(), target_R)
    packed = encode(rows, k=K, min_p=0.0, vocab_size=table.size)
    sample = Sample(
        sample_id="text:0#0",
        text=text,
        teacher_ids=encoded.ids,
        teacher_end=encoded.ends,
        packed=packed,
        realised_logprob=rows.target_logprob,
        space_logprob=rows.space_logprob,
        first_row=1,
        complete=True,
        snapped=encoded.snapped,
    )
    codec = CodecInfo(k=K, min_p=0.0, step=STEP)
    publish_part(root, 0, partial(_write, sample), CaptureCheck(table.size, codec))
    Folder(root).replace(MANIFEST, _manifest(root, tokenizer, codec, text).model_dump_json().encode())
    return logits_RU


def _write(sample: Sample, url: str) -> dict[str, int]:
    write_parquet(url, CAPTURE, [capture_batch([sample], CAPTURE)])
    return {}


def _manifest(root: str, tokenizer: TextTokenizer, codec: CodecInfo, text: str) -> CaptureManifest:
    size = tokenizer.table.size
    vocab, merges = tokenizer.table.to_tables()
    tables = {VOCAB_FILE: with_codes(vocab, np.arange(size, dtype=np.int32)), MERGES_FILE: merges}
    files = {name: write_table(root, name, content) for name, content in tables.items()}
    teacher = TeacherInfo(
        model="zipf",
        backend="fake",
        vocab_rows=size,
        context=1 << 20,
        dtype="float32",
        head_dtype="float32",
        device="cpu",
        capture_path="benchmark",
        engine_version="1",
    )
    return CaptureManifest(
        **provenance(),
        files=files,
        parts=list(committed(root).values()),
        teacher=teacher,
        tokenizer=tokenizer.table.info,
        bos=False,
        max_tokens=1024,
        codec=codec,
        corpus=CorpusInfo(source="benchmark", hash="0", documents=1, text_bytes=len(text.encode())),
        plan_hash="0",
        run_hash="0",
    )
