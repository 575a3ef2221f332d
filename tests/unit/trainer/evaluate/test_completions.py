"""Greedy continuations: what they are, where they stop, and that nothing but the model decides them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.evaluate import EvalSample
from xtoken.trainer.evaluate.completions import complete
from xtoken.trainer.evaluate.spelling import Spelling
from xtoken.trainer.objective import Student
from xtoken.trainer.student.model import load_student

V = 24
SPELLING = Spelling((b"", b"", *(bytes([97 + i]) for i in range(V - 2))), ("bos", "eos", *[None] * (V - 2)))
RNG = np.random.default_rng(4)
LENGTHS = {"long": 70, "short": 9, "same": 70, "one": 1, "two": 2}
SAMPLES = [EvalSample(RNG.integers(2, V, n).astype(np.int32), n, 1, name) for name, n in LENGTHS.items()]


@pytest.fixture
def student(student_dir: str) -> Student:
    return Student(load_student(student_dir, torch.device("cpu"), False).train(), torch.device("cpu"), None, V)


def continued(model: Any, prompt: list[int], count: int) -> list[int]:
    """One token after the other, everything read again each time."""
    found = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model.eval()(torch.tensor([found])).logits[0, -1, :V].argmax()))
            if found[-1] == 1:
                break
    return found[len(prompt) :]


def test_rows_are_the_models_own_greedy_words(student: Student, student_info: TokenizerInfo) -> None:
    rows = complete(student, student_info, SPELLING, SAMPLES, 4)
    assert student.model.training
    assert [row["id"] for row in rows] == ["long", "short", "same", "two"]  # one token is no prompt and text
    for row, length in zip(rows, (32, 4, 32, 1), strict=True):
        ids = next(sample.ids for sample in SAMPLES if sample.id == row["id"]).tolist()
        assert row["prompt"] == SPELLING.text(ids[:length])
        assert row["text"] == SPELLING.text(ids[length : length + 48])
        room = min(48, 64 - 1 - length)  # the model's context is 64
        assert row["completion"] == SPELLING.text(continued(student.model, [0, *ids[:length]], room))
    assert complete(student, student_info, SPELLING, SAMPLES, 4) == rows


def test_samples_are_taken_evenly(student: Student, student_info: TokenizerInfo) -> None:
    rows = complete(student, student_info, SPELLING, SAMPLES, 2)
    assert [row["id"] for row in rows] == ["long", "two"]
    assert complete(student, student_info, SPELLING, SAMPLES, 0) == []
    assert complete(student, student_info, SPELLING, [], 3) == []


def _bend(student: Student, favourite: int, by: float) -> None:
    """Let the model prefer one token everywhere, whatever stands before."""

    def forward(self: Any, args: Any, found: Any) -> Any:
        found.logits[..., favourite] += by
        return found

    student.model.register_forward_hook(forward)


def test_it_stops_at_the_end_of_text(student: Student, student_info: TokenizerInfo) -> None:
    _bend(student, 1, 100.0)
    rows = complete(student, student_info, SPELLING, SAMPLES, 2)
    assert [row["completion"] for row in rows] == ["<eos>", "<eos>"]


def test_padding_of_the_head_is_never_written(student: Student, student_info: TokenizerInfo) -> None:
    plain = complete(student, student_info, SPELLING, SAMPLES, 2)
    _bend(student, V + 3, 100.0)
    assert complete(student, student_info, SPELLING, SAMPLES, 2) == plain


def test_a_model_without_cache_reads_everything_again(student: Student, student_info: TokenizerInfo) -> None:
    plain = complete(student, student_info, SPELLING, SAMPLES, 4)
    calls: list[int] = []

    def forget(self: Any, args: Any, found: Any) -> Any:
        calls.append(found.logits.shape[1])
        found.past_key_values = None
        return found

    student.model.register_forward_hook(forget)
    assert complete(student, student_info, SPELLING, SAMPLES, 4) == plain
    assert calls[:2] == [2, 3]  # BOS and a prompt of one token, then one more


def test_a_generation_config_changes_nothing(student: Student, student_info: TokenizerInfo) -> None:
    plain = complete(student, student_info, SPELLING, SAMPLES, 2)
    student.model.generation_config.update(do_sample=True, repetition_penalty=5.0, suppress_tokens=[3, 4, 5])
    assert complete(student, student_info, SPELLING, SAMPLES, 2) == plain


def test_a_prompt_of_bytes_ends_with_a_whole_character(tmp_path: Path) -> None:
    """A student of 256 bytes without any special: no context token, and no token that ends a text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=128, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    student = Student(load_student(str(tmp_path), torch.device("cpu"), False), torch.device("cpu"), None, 256)
    spelling = Spelling(tuple(bytes([i]) for i in range(256)), (None,) * 256)
    info = TokenizerInfo(name="bytes", hash="c" * 64, kind="bytes", size=256, adds_bos=False)
    data = "ä€😀 und".encode() * 9
    sample = EvalSample(np.frombuffer(data, np.uint8).astype(np.int32), len(data), 1, "bytes")
    (row,) = complete(student, info, spelling, [sample], 1)
    whole = max(n for n in range(33) if b"\xef\xbf\xbd" not in data[:n].decode(errors="replace").encode())
    assert row["prompt"].encode() == data[:whole]
    assert row["text"].encode().startswith(data[whole : whole + 40])
    assert row["completion"]
