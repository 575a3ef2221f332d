"""Draws through the whole chain: what they train is right in the mean, and what would not be is refused.

The corpus repeats one text behind different first lines. The toy teacher looks at two tokens, so its rows over the
repeated text are the same in every document, and the draws are not: the mean gradient over the documents must be that
of the whole rows, up to its own standard error.

Shapes: D documents, C chunks of the repeated text, V student vocabulary, U teacher vocabulary.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.project.files import read_projection
from xtoken.pipeline.store.reader import iter_capture, iter_targets, load_vocab
from xtoken.pipeline.teachers.fake_teacher import FakeTeacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.manifest import TeacherInfo
from xtoken.schemas.tables import target_columns
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.losses.base import LossSetup, View

DOCUMENTS, DRAWS = 200, 12
REPEATED = "\nthe mill waits for rain; 27 boats, and the river runs."
SEEN = {
    "teacher": "the river runs past the old mill and 27 boats wait for rain in the morning " * 3,
    "student": "boats and mills and morning rains: running rivers wait, the other 277 do not " * 3,
}
Rows = NDArray[np.float64]


def xtoken(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [*(str(word) for word in words), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.output.replace("\n", " ")


def train_tokenizer(folder: Path, text: str, size: int) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([text], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small tokenizers, a capture of draws, and targets of it."""
    root = tmp_path_factory.mktemp("draws")
    teacher = train_tokenizer(root / "teacher", SEEN["teacher"], 320)
    student = train_tokenizer(root / "student", SEEN["student"], 300)
    lines = [json.dumps({"text": f"{number:04d}{REPEATED}"}) + "\n" for number in range(DOCUMENTS)]
    (root / "corpus.jsonl").write_text("".join(lines))
    common = ["--teacher", teacher, "--backend", "fake", "--draws", DRAWS, "--codec", "sampled"]
    figures = xtoken("precompute", root / "corpus.jsonl", *common, "--out", root / "capture", "--seed", 3)
    assert 2 < figures["entries_per_row"] <= DRAWS
    assert xtoken("verify", root / "capture")["kind"] == "capture"
    losses = ["--for", "ce,alm,p-kl,byte-prefix"]
    xtoken("project", "--student", student, "--teacher", root / "capture", "--out", root / "w")
    words = ["--student", student, "--w", root / "w", "--out", root / "targets"]
    xtoken("align", root / "capture", *words, *losses)
    xtoken("align", root / "capture", "--student", teacher, "--out", root / "same", "--for", "sparse-kl")
    return root


def whole_rows(root: Path) -> tuple[list[list[int]], Rows]:
    """Teacher tokens of each document, and the first one's whole rows [R, U]."""
    table = load_vocab(str(root / "capture"))
    ids = [row["teacher_ids"] for batch in iter_capture(str(root / "capture")) for row in batch.to_pylist()]
    info = TeacherInfo.model_construct()
    (rows,) = FakeTeacher(info, table.size, table.starts_with_space()).rows([np.array(ids[0], np.int32)])
    p_RU = np.zeros((len(ids[0]) - 1, table.size))
    np.put_along_axis(p_RU, rows.ids.astype(np.int64), np.exp(rows.logprob.astype(np.float64)), axis=1)
    return ids, p_RU


def samples_of(root: str | Path) -> list[dict[str, Any]]:
    """Targets as readers see them."""
    return [row for batch in iter_targets(str(root)) for row in batch.to_pylist()]


def repeated(sample: dict[str, Any], loss: str) -> tuple[list[int], dict[str, NDArray[Any]]]:
    """Teacher token that begins each chunk of the repeated text, and the columns of ``loss`` there."""
    first_byte = len("0000\nthe")  # from here on the teacher's last two tokens are the same in every document
    cut = np.searchsorted(np.array(sample["student_end"])[np.array(sample["chunk_student_end"]) - 1], first_byte) + 1
    token = sample["chunk_student_end"][cut - 1]
    skip = {"chunk": cut, "token": token}
    columns: dict[str, NDArray[Any]] = {}
    for name, axis in target_columns([loss], base=False):
        values = np.array(sample[name])
        if axis in skip:
            columns[name] = values[skip[axis] :]
        else:
            per = next(of for count, of in target_columns([loss]) if count == axis)
            columns[name] = values[sum(sample[axis][: skip[per]]) :]
    ends = [sample["chunk_student_end"][cut - 1 :], sample["chunk_teacher_end"][cut - 1 : -1]]
    columns["first"] = np.array(ends[0][:-1]) - token
    columns["length"] = np.diff(ends[0])
    return ends[1], columns


def gradients(root: str, loss: str, **options: Any) -> tuple[Rows, list[int], Rows]:
    """Gradients of each document [D, P, V], first teacher tokens of its chunks, and the student's logits [P, V]."""
    targets = Targets(root)
    size = targets.manifest.student.size
    setup = LossSetup(
        targets.w, targets.vocab, size, targets.manifest.teacher_tokenizer.size, torch.device("cpu"),
        LossOptions(**options),
    )  # fmt: skip
    opened = open_loss(loss, setup)
    samples = samples_of(root)
    places, first = repeated(samples[0], loss)
    positions = int(first["length"].sum())
    logits_PV = torch.randn(positions, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    found = []
    for sample in samples:
        here, columns = repeated(sample, loss)
        assert np.diff(here).tolist() == np.diff(places).tolist()
        assert columns["first"].tolist() == first["first"].tolist()
        z_PV = logits_PV.clone().requires_grad_()
        fields = {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in columns.items()}
        start, length = fields.pop("first").long(), fields.pop("length").long()
        label, after = torch.zeros(positions, dtype=torch.int64), torch.full_like(start, -1)
        view = View(start, length, after, fields, logp_PV=torch.log_softmax(z_PV, -1), label_P=label)
        opened.terms(view).sum().backward()
        assert z_PV.grad is not None
        found.append(z_PV.grad.numpy())
    return np.stack(found), places, logits_PV.numpy()


def error_in_deviations(found_DPV: Rows, exact_PV: Rows) -> Rows:
    """Error of the mean over its standard error, along random directions at each position that has a target.

    Single entries would not do: of a token that is drawn once in a thousand documents the spread is not seen.
    """
    along_VX = np.random.default_rng(0).choice([-1.0, 1.0], (exact_PV.shape[1], 30))
    some_P = np.abs(exact_PV).sum(axis=1) > 0
    found_DPX, exact_PX = found_DPV[:, some_P] @ along_VX, exact_PV[some_P] @ along_VX
    deviations: Rows = (found_DPX.mean(axis=0) - exact_PX) / (found_DPX.std(axis=0) / np.sqrt(len(found_DPX)))
    return deviations


def dense_gradient(logits_PV: Rows, first: list[int], term: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
    z_PV = torch.tensor(logits_PV, requires_grad=True)
    term(torch.log_softmax(z_PV, -1)[torch.tensor(first)]).backward()
    assert z_PV.grad is not None
    return z_PV.grad.numpy()


def assert_right_in_the_mean(found_DPV: Rows, exact_PV: Rows) -> None:
    deviations = error_in_deviations(found_DPV, exact_PV)
    assert deviations.size > 200
    assert np.abs(deviations).max() < 6
    assert 0.7 < np.sqrt((deviations**2).mean()) < 1.3
    np.testing.assert_allclose(found_DPV.mean(axis=0), exact_PV, atol=0.03)


def firsts(root: str, loss: str) -> list[int]:
    return repeated(samples_of(root)[0], loss)[1]["first"].tolist()


def test_p_kl_is_that_of_whole_rows_in_the_mean(chain: Path) -> None:
    root = str(chain / "targets")
    _, p_RU = whole_rows(chain)
    found_DPV, places, logits_PV = gradients(root, "p-kl")
    projection = read_projection(str(chain / "w"))
    route_U = projection.routes("prefix")
    w_VU = np.zeros((projection.student.size, projection.teacher.size))
    w_VU[projection.student_id, projection.teacher_id] = projection.weight
    p_CU = np.zeros((len(places), p_RU.shape[1]))
    for target in np.flatnonzero(route_U >= 0):
        p_CU[:, route_U[target]] += p_RU[np.array(places) - 1, target]
    assert (route_U != np.arange(len(route_U))).any(), "some mass is moved"

    def term(logp_CV: torch.Tensor) -> torch.Tensor:
        q_CU = logp_CV.exp() @ torch.tensor(w_VU)
        return -(torch.tensor(p_CU) * q_CU.clamp(min=1e-300).log()).sum()

    exact_PV = dense_gradient(logits_PV, firsts(root, "p-kl"), term)
    assert_right_in_the_mean(found_DPV, exact_PV)
    # what is refused by name is refused for a reason
    dropped_DPV = gradients(root, "p-kl", rest="drop")[0]
    assert np.sqrt((error_in_deviations(dropped_DPV, exact_PV) ** 2).mean()) > 3


def test_sparse_kl_is_that_of_whole_rows_in_the_mean(chain: Path) -> None:
    root = str(chain / "same")
    _, p_RU = whole_rows(chain)
    found_DPV, places, logits_PV = gradients(root, "sparse-kl")
    p_CU = torch.tensor(p_RU[np.array(places) - 1])
    exact_PV = dense_gradient(logits_PV, firsts(root, "sparse-kl"), lambda logp_CV: -(p_CU * logp_CV).sum())
    assert_right_in_the_mean(found_DPV, exact_PV)
    reverse_DPV = gradients(root, "sparse-kl", kl="reverse")[0]
    p_CU.clamp_(min=1e-300)
    exact_PV = dense_gradient(
        logits_PV, firsts(root, "sparse-kl"), lambda logp_CV: (logp_CV.exp() * (logp_CV - p_CU.log())).sum()
    )
    assert np.sqrt((error_in_deviations(reverse_DPV, exact_PV) ** 2).mean()) > 3


def test_the_root_of_byte_prefix_is_that_of_whole_rows_in_the_mean(chain: Path) -> None:
    root = str(chain / "targets")
    _, p_RU = whole_rows(chain)
    found_DPV, places, logits_PV = gradients(root, "byte-prefix", prefix=["root"])
    teacher, student = load_vocab(str(chain / "capture")), load_tokenizer(str(chain / "student")).table
    by_bytes = {data: i for i, data in enumerate(student.pieces()) if data and student.role[i] is None}
    p_CV = np.zeros((len(places), student.size))
    for token, data in enumerate(teacher.pieces()):
        longest = [by_bytes[data[:n]] for n in range(len(data), 0, -1) if data[:n] in by_bytes]
        own = student.info.eos_id if teacher.role[token] == "eos" else longest[0]
        p_CV[:, own] += p_RU[np.array(places) - 1, token]
    # tokens are joined under their prefixes: the student has fewer cells than the teacher has tokens
    assert (p_CV > 0).sum() < (p_RU[np.array(places) - 1] > 0).sum()
    exact_PV = dense_gradient(logits_PV, firsts(root, "p-kl"), lambda logp_CV: -(torch.tensor(p_CV) * logp_CV).sum())
    assert_right_in_the_mean(found_DPV, exact_PV)


def test_targets_of_draws_hold_no_rest_no_interior_and_the_exact_entropy(chain: Path) -> None:
    manifest = Targets(str(chain / "targets")).manifest
    assert (manifest.codec, Targets(str(chain / "same")).manifest.codec) == ("sampled", "sampled")
    assert xtoken("verify", chain / "targets")["kind"] == "targets"
    _, p_RU = whole_rows(chain)
    entropy_R = -(p_RU * np.log(p_RU)).sum(axis=1)
    sample = samples_of(chain / "targets")[0]
    starts = [0, *sample["chunk_teacher_end"][:-1]]
    rows = [start - 1 for start in starts if start]
    assert sample["teacher_entropy"] == pytest.approx(entropy_R[rows].mean(), rel=1e-4)
    assert 0.1 < sample["teacher_top1"] <= 1
    for count, rest in (("pkl_count", "pkl_rest_logprob"), ("prefix_count", "prefix_rest_logprob")):
        assert all(value == -np.inf for n, value in zip(sample[count], sample[rest], strict=True) if n)
    begins = {0, *sample["chunk_student_end"]}
    assert all(not n for at, n in enumerate(sample["prefix_count"]) if at not in begins)
    assert len(begins) < len(sample["prefix_count"])
    assert sum(sample["child_count"]) == 0
    counts = np.array(sample["prefix_count"])
    spans = zip(np.cumsum(counts) - counts, np.cumsum(counts), strict=True)
    mass = [np.exp(sample["prefix_logprob"][low:high]).sum() for low, high in spans if low < high]
    np.testing.assert_allclose(mass, 1, atol=1e-5)


@pytest.fixture(scope="module")
def student_model(chain: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(chain / "student")
    return chain / "student"


@pytest.mark.parametrize(("loss", "options"), [("p-kl", []), ("byte-prefix", ["--prefix", "root"]), ("alm", [])])
def test_they_train(chain: Path, student_model: Path, tmp_path: Path, loss: str, options: list[str]) -> None:
    words = ["--student", student_model, "--out", tmp_path / "run", "--loss", loss, *options]
    summary = xtoken("train", chain / "targets", *words, "--steps", 2, "--step-tokens", 256)
    assert summary["steps"] == 2
    assert np.isfinite(summary["kd"])
    assert summary["kd"] > 0


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("p-kl", ["--kl", "reverse"], "use --kl forward"),
        ("p-kl", ["--rest", "drop"], "use --rest bucket"),
        ("byte-prefix", [], "use --prefix root"),
        ("byte-prefix", ["--prefix", "root,child"], "use --prefix root"),
    ],
)
def test_what_draws_cannot_train_is_refused(
    chain: Path, student_model: Path, tmp_path: Path, loss: str, options: list[str], message: str
) -> None:
    words = ["--student", student_model, "--out", tmp_path / "run", "--loss", loss, *options]
    said = xtoken("train", chain / "targets", *words, code=2)
    assert "codec sampled" in said
    assert message in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "h-kl"], "--for h-kl"),
        (["--for", "p-kl,gold,uld"], "--for gold"),
        (["--for", "p-kl", "--tau", "2"], "--tau 2"),
        (["--for", "p-kl", "--merge", "mean"], "--merge mean"),
        (["--for", "p-kl", "--unreached", "none"], "--unreached none"),
        (["--for", "p-kl", "--unreached", "rest"], "--unreached rest"),
    ],
)
def test_what_is_not_linear_in_draws_is_not_aligned(
    chain: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    said = xtoken("align", chain / "capture", "--student", "bytes", "--out", tmp_path / "t", *options, code=2)
    assert "draws" in said
    assert message in said
    assert "--codec topk" in said
    assert not (tmp_path / "t").exists()


def test_merges_that_need_no_rows_are_aligned(chain: Path, tmp_path: Path) -> None:
    words = ["--student", "bytes", "--for", "ce,alm"]
    for merge in ("last", "first"):
        xtoken("align", chain / "capture", *words, "--out", tmp_path / merge, "--merge", merge)


def test_an_audit_is_weighted_by_the_draws(chain: Path, tmp_path: Path) -> None:
    from xtoken.pipeline.project.mass import teacher_mass

    found = teacher_mass(str(chain / "capture"), 10**6)
    assert found is not None
    assert found.not_kept == 0
    rows = [row for batch in iter_capture(str(chain / "capture")) for row in batch.to_pylist()]
    count_U = np.zeros(len(found.share_U))
    for row in rows:
        np.add.at(count_U, row["draw_ids"], row["draw_count"])
    assert found.rows == sum(len(row["drawn"]) for row in rows)
    np.testing.assert_allclose(found.share_U, count_U / (found.rows * DRAWS))
    xtoken("project", "--student", "bytes", "--teacher", chain / "capture", "--out", tmp_path / "w")
