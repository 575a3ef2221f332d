"""Held-out conversations: bits by kind of span, answers to questions, nearness to the teacher."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from xtoken.schemas.chat import ChatInfo
from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.evaluate import EvalSample, Question, TaughtSpan, evaluate
from xtoken.trainer.evaluate.completions import complete
from xtoken.trainer.evaluate.spelling import Spelling
from xtoken.trainer.losses import reference
from xtoken.trainer.objective import Student
from xtoken.trainer.student.model import load_student

V = 24
RNG = np.random.default_rng(3)


def ids(count: int) -> Any:
    return RNG.integers(2, V, count).astype(np.int32)


SAMPLES = [
    EvalSample(
        ids(20),
        12,
        0,
        "a#0",
        "web",
        (
            TaughtSpan("assistant", 4, 9, 7),
            TaughtSpan("stop", 9, 10, 0),
            TaughtSpan("call", 13, 18, 5),
            TaughtSpan("stop", 18, 19, 0),
        ),
    ),
    EvalSample(ids(9), 3, 0, "b#0", "web", (TaughtSpan("assistant", 6, 8, 3),)),
    EvalSample(ids(11), 8, 0, "c#0", "web", (TaughtSpan("thinking", 2, 5, 4), TaughtSpan("assistant", 5, 8, 4))),
]


def eval_config(student_dir: str, **options: Any) -> EvalConfig:
    return EvalConfig(model=student_dir, max_tokens=32, device="cpu", **options)


def logp_of(model: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([list(map(int, tokens))])).logits[0, :, :V]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("block", [1 << 24, 60])
def test_bits_by_kind(
    student_dir: str, student_info: TokenizerInfo, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """No BOS is put before a conversation, and what is not taught counts neither bits nor bytes."""
    monkeypatch.setattr("xtoken.trainer.blocks.BLOCK_ELEMENTS", block)
    rows: list[dict[str, Any]] = []
    figures = evaluate(eval_config(student_dir, text="given"), student_info, SAMPLES, Silent(), rows)
    model, bits = load_student(student_dir, torch.device("cpu"), False), dict[tuple[str, str], float]()
    for sample in SAMPLES:
        logp = logp_of(model, sample.ids)
        for span in sample.taught or ():
            nats = -sum(float(logp[at - 1, sample.ids[at]]) for at in range(span.start, span.stop))
            bits[sample.id, span.kind] = bits.get((sample.id, span.kind), 0.0) + nats / math.log(2)
    of = {kind: sum(value for (_, one), value in bits.items() if one == kind) for kind in ("assistant", "call", "stop")}
    of["thinking"] = bits["c#0", "thinking"]
    assert figures["bytes"] == 23
    assert figures["bits_per_byte"] == pytest.approx(sum(of.values()) / 23, rel=1e-5)
    assert figures["by_kind"] == {
        "assistant": {"bits_per_byte": pytest.approx(of["assistant"] / 14, rel=1e-5), "bytes": 14},
        "call": {"bits_per_byte": pytest.approx(of["call"] / 5, rel=1e-5), "bytes": 5},
        "stop": {"bits_per_token": pytest.approx(of["stop"] / 2, rel=1e-5), "tokens": 2},
        "thinking": {"bits_per_byte": pytest.approx(of["thinking"] / 4, rel=1e-5), "bytes": 4},
    }
    per_sample = [sum(value for (name, _), value in bits.items() if name == sample.id) for sample in SAMPLES]
    assert [row["bits"] for row in rows] == pytest.approx(per_sample, rel=1e-5)
    assert [row["bytes"] for row in rows] == [12, 3, 8]


SPELLING = Spelling((b"", b"", *(bytes([97 + i]) for i in range(V - 2))), ("bos", "eos", *[None] * (V - 2)))


def asked(count: int, stop: int | None = None, name: str = "q") -> EvalSample:
    question = Question(ids(count), f"question of {count}", "the answer", stop)
    return EvalSample(ids(5), 1, 0, name, "", (TaughtSpan("assistant", 3, 4, 1),), question)


@pytest.fixture
def student(student_dir: str) -> Student:
    return Student(load_student(student_dir, torch.device("cpu"), False).train(), torch.device("cpu"), None, V)


def test_completions_are_answers(student: Student, student_info: TokenizerInfo) -> None:
    """Nothing is put before the question; the context of 64 tokens bounds what is written."""
    samples = [asked(7, name="a"), asked(40, name="b"), asked(64, name="too long"), asked(7, name="c")]
    rows = complete(student, student_info, SPELLING, samples, 9)
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    for row, sample in zip(rows, (samples[0], samples[1], samples[3]), strict=True):
        assert sample.question is not None
        found = sample.question.ids.tolist()
        while len(found) < 64 and found[-1] != 1:
            found.append(int(logp_of(student.model.eval(), found)[-1].argmax()))
        assert row["completion"] == SPELLING.text(found[len(sample.question.ids) :])
        assert (row["prompt"], row["text"]) == (sample.question.text, "the answer")
    assert complete(student, student_info, SPELLING, samples, 9) == rows


def test_an_answer_ends_with_the_stop_of_its_template(student: Student, student_info: TokenizerInfo) -> None:
    sample = asked(7)
    assert sample.question is not None
    first = int(logp_of(student.model.eval(), sample.question.ids)[-1].argmax())
    (plain,) = complete(student, student_info, SPELLING, [sample], 1)
    assert len(plain["completion"]) > 1
    stopped = [
        EvalSample(sample.ids, 1, 0, name, "", sample.taught, Question(sample.question.ids, "q", "a", stop))
        for name, stop in (("stops", first), ("goes on", None))
    ]
    rows = complete(student, student_info, SPELLING, [*stopped, SAMPLES[0]], 3)
    assert [row["completion"] for row in rows] == [SPELLING.text([first]), plain["completion"]]


def test_kl_and_agreement_of_conversations(
    make_targets: Callable[..., str], student_dir: str, student_info: TokenizerInfo, chat_info: ChatInfo, pair: Any
) -> None:
    """Over chunks with a target, each sample as its template has it; the teacher's bytes are those of its chunks."""
    root = make_targets([[9, 25, 31], [30, 32]], losses=("p-kl",), step=1 / 64, chat=chat_info)
    figures = evaluate(eval_config(student_dir, targets=root), student_info, [], Silent())
    targets, model = Targets(root), load_student(student_dir, torch.device("cpu"), False)
    W, kl, nats, size = torch.from_numpy(pair.weight_VU), list[float](), 0.0, 0
    for ref in targets.groups:
        names = ("student_ids", "student_end", "chunk_student_end", "teacher_logprob")
        group = targets.read(ref, (*names, "pkl_count", "pkl_ids", "pkl_logprob", "pkl_rest_logprob"))
        for row in range(ref.rows):
            tokens, byte, ends, logprob = (group.values(name, row) for name in names)
            p, entry, low = logp_of(model, tokens).exp(), 0, 0
            for c, high in enumerate(ends.tolist()):
                count = int(group.values("pkl_count", row)[c])
                span = slice(entry, entry + count)
                if not math.isnan(logprob[c]):
                    kept = zip(
                        group.values("pkl_ids", row)[span].tolist(),
                        np.exp(group.values("pkl_logprob", row)[span].astype(float)),
                        strict=True,
                    )
                    tail = math.exp(group.values("pkl_rest_logprob", row)[c])
                    kl.append(float(reference.p_kl(p[low - 1], W, dict(kept), tail)))
                    nats, size = nats - float(logprob[c]), size + int(byte[high - 1] - byte[low - 1])
                entry, low = entry + count, high
    assert figures["chunks"] == len(kl) > 20
    assert figures["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert figures["teacher_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_several_models_do_not_read_conversations_as_one(
    make_targets: Callable[..., str], student_dir: str, student_info: TokenizerInfo, chat_info: ChatInfo
) -> None:
    root = make_targets([[20, 30]], losses=("p-kl",), step=1 / 64, chat=chat_info)
    config = {"model": [student_dir, student_dir], "combine": "prob", "max_tokens": 32, "device": "cpu"}
    message = "holds conversations, and --combine prob joins models on plain text; measure the models one by one"
    for given, samples in (({"text": "chats"}, SAMPLES), ({"targets": root}, [])):
        with pytest.raises(XtokenError, match=f"--{next(iter(given))} .*{message}"):
            evaluate(EvalConfig(**config, **given), student_info, samples, Silent(), others=[student_info])
