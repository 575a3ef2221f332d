"""Write golden captures and targets with the code on the import path (see README.md): ``make_captures.py NAME ...``.

For an old release: ``PYTHONPATH=OLD_CHECKOUT python tests/golden/make_captures.py v1-topk v1-tau v2-targets``.
Everything runs in an empty folder with relative paths, so that no manifest names a machine. ``NAME.expected.json``
holds first rows as the fake teacher gives them over its whole vocabulary, never through a codec.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent / "captures"
sys.path.append(str(HERE.parents[1]))
TOKENIZER = "tiny"
TEXTS = [
    "The river runs past the old mill, and 27 boats wait for rain. " * 3,
    "Der Fluss fließt – naïve Leser zählen 3 Brücken; Ελληνικά, кириллица, 日本語。 👩‍👩‍👧\n",
    "def area(r):\r\n\treturn 3.14159 * r * r  # unit: m²\n" * 2,
    "short",
]
# Conversations: a system prompt, several turns, reasoning, a call, an answer that is switched off, and text that looks
# like control tokens; nothing of the first is taught, the last is too long and is cut.
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "short"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The river runs past the old mill?"},
        {"role": "assistant", "reasoning_content": "27 boats wait.", "content": "It runs, naïve Leser: 日本語。"},
    ],
    [
        {"role": "user", "content": "</s>\n<|system|>\nrain"},
        {"role": "assistant", "content": "wait", "train": False},
        {"role": "user", "content": "def area(r):"},
        {"role": "assistant", "content": "\treturn 3.14159 * r * r</s>"},
    ],
    [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "rain", "arguments": {"unit": "m²"}}}],
        },
        {"role": "tool", "content": "27"},
        {"role": "assistant", "content": "27 boats wait."},
    ],
    [
        {"role": "user", "content": "short"},
        {"role": "assistant", "content": "short"},
        {"role": "user", "content": TEXTS[0]},
        {"role": "assistant", "content": TEXTS[0]},
    ],
]
PROMPTS = [CHATS[1][:2], [{"role": "user", "content": "def area(r):"}]]
TEMPLATES = ("zephyr.jinja", "vicuna.jinja")
CAPTURE = ["corpus.jsonl", "--teacher", TOKENIZER, "--backend", "fake", "--max-tokens", "64"]
CAPTURE += ["--shard-bytes", "250", "--min-p", "0.003"]
TOPK = [*CAPTURE, "--k", "8"]
RUNS = {
    "v1-topk": TOPK,
    "v1-tau": [*TOPK, "--temperatures", "0.5,2"],
    "v2-topk": TOPK,
    "v2-tau": [*TOPK, "--temperatures", "0.5,2"],
    "v2-sampled": [*CAPTURE, "--codec", "sampled", "--draws", "50", "--seed", "7"],
    "v3-topk": TOPK,
    "v3-tau": [*TOPK, "--temperatures", "0.5,2"],
    "v3-sampled": [*CAPTURE, "--codec", "sampled", "--draws", "50", "--seed", "7"],
    "v4-topk": TOPK,
    "v5-topk": [*TOPK, "--space", "paper"],
    "v6-chats": [
        *("chats.jsonl", "--teacher", TOKENIZER, "--backend", "fake", "--max-tokens", "128", "--shard-bytes", "120"),
        *("--k", "8", "--min-p", "0.003", "--learn", "thinking", "--template", "zephyr.jinja", "--date", "2026-07-04"),
        *("--on-bad", "skip"),
    ],
    "v6-answers": [
        *("prompts.jsonl", "--teacher", TOKENIZER, "--backend", "fake", "--max-tokens", "128", "--shard-bytes", "60"),
        *("--k", "8", "--min-p", "0.003", "--template", "zephyr.jinja", "--date", "2026-07-04"),
        *("--generate", "6", "--temperature", "0.7", "--top-p", "0.5", "--samples", "3", "--seed", "1"),
    ],
    "v6-ids": [
        *("ids.jsonl", "--teacher", TOKENIZER, "--tokenizer", TOKENIZER, "--backend", "fake", "--max-tokens", "128"),
        *("--shard-bytes", "250", "--k", "8", "--min-p", "0.003"),
    ],
}
# Of a DistillKit set that tests/distillkit_sets.py writes, with rows of this file's own.
IMPORTED = {"v7-imported": ["--k", "8", "--license", "corpus=cc0-1.0,outputs=cc0-1.0", "--source", "made/up"]}
AUDITED = ("v3-topk", "v3-tau", "v3-sampled")
# Begun on another device than it was ended on.
MIXED = ("v4-topk",)
# Targets are of a capture that is made beside them and thrown away.
TARGETS = {"v2-targets": TOPK, "v3-targets": TOPK, "v3-targets-sampled": RUNS["v2-sampled"], "v4-targets": TOPK}
TARGETS["v5-targets"] = RUNS["v5-topk"]
TARGETS["v6-targets"] = TOPK
TARGETS["v7-targets"] = RUNS["v6-chats"]
TARGETS["v8-targets"] = IMPORTED["v7-imported"]
LOSSES = {"v2-targets": "p-kl,h-kl,alm", "v3-targets": "p-kl,h-kl,alm", "v4-targets": "p-kl,h-kl,alm"}
LOSSES["v5-targets"] = "alm"
LOSSES["v8-targets"] = "p-kl,h-kl,gold,strict,byte-prefix"
LOSSES["v6-targets"] = LOSSES["v7-targets"] = "p-kl,h-kl,alm,strict,byte-prefix"
# Students other than bytes, and the chat template of theirs.
STUDENTS = {"v7-targets": [TOKENIZER, "--template", "vicuna.jinja"]}
# Targets that set a part aside: that of a document before the others, whose part is cut short.
SET_ASIDE = ("v4-targets",)
RUN_ONLY = (
    "run.json",
    "teacher.json",
    "align.json",
    "import.json",
    "workers",
    "audits",
    "skips",
    "log.jsonl",
    "status.json",
    "log-1-of-2.jsonl",
    "status-1-of-2.json",
)  # of the run that wrote it, never shared
TAUS = {"v1-tau": (0.5, 2.0), "v2-tau": (0.5, 2.0), "v3-tau": (0.5, 2.0)}
ROWS = 6


def train_tokenizer(path: Path) -> None:
    """A byte-level BPE of 400 tokens on the texts above; kept in the repository, so that every release sees one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    path.mkdir(parents=True)
    backend.save(str(path / "tokenizer.json"), pretty=False)
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}\n')


def xtoken(*arguments: str, code: int = 0) -> None:
    """Run a verb in this process under a neutral command line; it must end with that exit code."""
    from xtoken.cli import app

    sys.argv = ["xtoken", *arguments]
    try:
        app()
    except SystemExit as stop:
        if (stop.code or 0) != code:
            raise


def expected_rows(capture: Path, taus: tuple[float, ...]) -> list[dict[str, Any]]:
    """The first rows of the first sample as the teacher gives them, never through a codec or our reader."""
    from xtoken.pipeline.teachers.fake_teacher import FakeTeacher
    from xtoken.pipeline.tokens import load_tokenizer
    from xtoken.schemas.manifest import TeacherInfo

    first = pq.read_table(capture / "data" / "part-00000.parquet").to_pylist()[0]
    table = load_tokenizer(TOKENIZER).table
    info = TeacherInfo.model_construct()
    size = table.size
    taught_R = np.arange(len(first["teacher_ids"]) - 1)
    if "span_learn" in first:  # row r is about token r + 1
        taught_R = np.flatnonzero(np.repeat(first["span_learn"], np.diff(first["span_token_end"], prepend=0))) - 1
    (rows,) = FakeTeacher(info, size, table.starts_with_space(), taus).rows([np.array(first["teacher_ids"], np.int32)])
    found = []
    for at, row in enumerate(taught_R[:ROWS].tolist()):
        entry: dict[str, Any] = {"sample_id": first["sample_id"], "row": at}
        entry["ids"] = rows.ids[row, :8].tolist()
        entry["logprob"] = [round(float(value), 9) for value in rows.logprob[row, :8]]
        entry["realised_logprob"] = round(float(rows.target_logprob[row]), 6)
        p_U = np.exp(rows.logprob[row].astype(np.float64))
        entry["entropy"] = round(float(-(p_U * np.log(p_U)).sum()), 6)
        if taus:
            scaled_nU = np.stack([p_U ** (1 / tau) / (p_U ** (1 / tau)).sum() for tau in taus])
            entry["tau_logprob"] = {
                f"{tau:g}": np.log(q[:8]).round(9).tolist() for tau, q in zip(taus, scaled_nU, strict=True)
            }
        found.append(entry)
    return found


def audit(name: str) -> None:
    """What a worker of an engine with settings and two ways out leaves; the fake teacher has neither."""
    from xtoken.pipeline.capture.audit import open_audit
    from xtoken.pipeline.capture.worker import open_tokenizer
    from xtoken.pipeline.store.files import Folder
    from xtoken.pipeline.teachers import open_teacher
    from xtoken.schemas.configs.capture import PrecomputeConfig

    flags = {flag[2:].replace("-", "_"): value for flag, value in zip(*[iter(RUNS[name][1:])] * 2, strict=True)}
    taus = {"temperatures": flags.pop("temperatures").split(",")} if "temperatures" in flags else {}
    config = PrecomputeConfig.from_flat(corpus=RUNS[name][0], out=name, **flags, **taus)
    tokenizer, folder = open_tokenizer(config.teacher), Folder(name)
    teacher: Any = open_teacher(config.teacher, config.codec, tokenizer.table)
    teacher.second_path = teacher.rows
    look = open_audit(config, folder, tokenizer, teacher, np.zeros(0, np.int32))
    assert look is not None
    look(0)
    record = json.loads(folder.read("teacher.json"))
    settings = {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.8, "prefix_caching": False, "runner": "v1"}
    folder.replace("teacher.json", json.dumps({**record, "engine_settings": settings}).encode())


def begin_elsewhere(name: str) -> None:
    """Every other part, as if an engine on a GPU had made it."""
    xtoken("precompute", *RUNS[name], "--out", name, "--cell", "1/2", "--quiet")
    record = Path(name) / "teacher.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"device": "NVIDIA H100 80GB HBM3"}))


def drawn_rows(ids: list[int], size: int, rng: np.random.Generator) -> "np.ndarray[Any, Any]":
    """A distribution for each token, from which its rank was drawn: log-probabilities, float32 [T, size]."""
    rows = []
    for token in ids:
        logit_U = -1.6 * np.log(np.arange(1, size + 1)) + 0.2 * rng.standard_normal(size)
        p_U = np.sort(np.exp(logit_U) / np.exp(logit_U).sum())[::-1]
        others = rng.permutation(np.delete(np.arange(size), token))
        order = np.insert(others, rng.choice(size, p=p_U), token)
        rows.append(np.log(p_U)[np.argsort(order)])
    return np.array(rows, np.float32)


def write_set(folder: str) -> list[dict[str, Any]]:
    """The texts as documents of a DistillKit set; returns what ``expected_rows`` returns."""
    from distillkit_sets import QWEN3, Document, sampled, write
    from tokenizers import Tokenizer

    backend, rng = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json"), np.random.default_rng(7)
    size, documents = backend.get_vocab_size(), []
    for text in TEXTS:
        ids = np.array([*backend.encode(text).ids, 0])
        # row j of the file is about token j + 1
        rows = drawn_rows(ids.tolist(), size, rng)
        documents.append(Document(ids, np.concatenate([rows[1:], rows[:1]])))
    config = {**QWEN3, "k": 64}
    write(Path(folder, "rows.parquet"), [sampled(one, config, size) for one in documents], config, size)
    found = []
    for row in range(ROWS):
        logp_U, label = documents[0].logprob[row].astype(np.float64), int(documents[0].ids[row + 1])
        order = np.argsort(-logp_U, kind="stable")
        known = label in order[: config["exact_k"]]
        p_U = np.exp(logp_U)
        entry: dict[str, Any] = {"sample_id": "rows.parquet:0.0#0", "row": row, "ids": order[:8].tolist()}
        entry["logprob"] = [round(float(value), 9) for value in logp_U[order[:8]]]
        entry["realised_logprob"] = round(float(logp_U[label]), 6) if known else None
        entry["entropy"] = round(float(-(p_U * np.log(p_U)).sum()), 6)
        found.append(entry)
    return found


def import_set(name: str, out: str) -> list[dict[str, Any]]:
    """Import such a set."""
    rows = write_set("set")
    xtoken("import", "distillkit", "set", "--tokenizer", TOKENIZER, *IMPORTED[name], "--out", out, "--quiet")
    return rows


def make(name: str) -> None:
    """Write one golden folder; the working folder is empty but for the tokenizer and the corpus."""
    if name in IMPORTED:
        write_expected(name, import_set(name, name))
    elif name in RUNS:
        if name in MIXED:
            begin_elsewhere(name)
        xtoken("precompute", *RUNS[name], "--out", name, "--quiet")
        if name in AUDITED:
            audit(name)
            xtoken("precompute", *RUNS[name], "--out", name, "--quiet")
        write_expected(name, expected_rows(Path(name), TAUS.get(name, ())))
    else:
        source, aside = "capture-" + name, name in SET_ASIDE
        if aside:
            write_corpus(["A document whose part is lost. " * 9, *TEXTS])
        if name == "v8-targets":
            import_set("v7-imported", source)
        else:
            xtoken("precompute", *TARGETS[name], "--out", source, "--quiet")
        student = STUDENTS.get(name, ["bytes"])
        losses = LOSSES.get(name, "p-kl,alm")
        words = ["align", source, "--student", *student, "--for", losses, "--out", name, "--quiet"]
        if aside:
            first = Path(source) / "data" / "part-00000.parquet"
            first.write_bytes(first.read_bytes()[:100])
        xtoken(*words, *(["--on-bad", "set-aside"] if aside else []), code=4 if aside else 0)
    for left in RUN_ONLY:
        path = Path(name) / left
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    shutil.rmtree(HERE / name, ignore_errors=True)
    shutil.copytree(name, HERE / name)


def write_expected(name: str, rows: list[dict[str, Any]]) -> None:
    """First rows, one a line."""
    (HERE / f"{name}.expected.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def write_corpus(texts: list[str]) -> None:
    """A document a line; the conversations; two prompts without answers; and texts as token ids, taught from within."""
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    Path("prompts.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in PROMPTS))
    Path("ids.jsonl").write_text("".join(json.dumps(ids_row(text)) + "\n" for text in TEXTS))


def ids_row(text: str) -> dict[str, list[int]]:
    """A question and an eos, which are not taught, and the beginning of a text and an eos, which are; padded."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")
    asked, answer = ([*backend.encode(one).ids, 0] for one in ("rain?", text[:60]))
    return {
        "input_ids": [*asked, *answer, 0],
        "labels": [-100] * len(asked) + answer + [-100],
        "attention_mask": [1] * len(asked + answer) + [0],
    }


def main(names: list[str]) -> None:
    """Write the named goldens, in a folder of their own."""
    if not (HERE / TOKENIZER).exists():
        train_tokenizer(HERE / TOKENIZER)
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(HERE / TOKENIZER, Path(work) / TOKENIZER)
        for template in TEMPLATES:
            shutil.copy(HERE / template, work)
        os.chdir(work)
        for name in names:
            write_corpus(TEXTS)
            make(name)
        os.chdir(HERE)


if __name__ == "__main__":
    main(sys.argv[1:])
