"""REST at other temperatures as stored from hf rows, against the whole output head in float64."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from xtoken.pipeline.store.codecs.topk import STEP, Packed, decode, decode_tau_tail, encode
from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.teachers.base import Teacher, TeacherRows
from xtoken.pipeline.tokens import TokenTable, load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig

VOCAB = 101
TEMPERATURES = [0.5, 2.0, 4.0]
TEXT = "The ferry to Ísafjörður leaves at 07:45; dogs travel free.\ndef f(x):\n    return x + 1\n日本語のテキスト。"
# Relative: float32 logits of a small model against float64. A REST of float32 rounding is none, below temperature 1
# rounding grows with its inverse.
CLOSE = 2e-4
NOISE = 2e-6


def tiny(folder: Path, head_scale: float) -> Path:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(head_scale)
    model.save_pretrained(folder)
    return folder


def table_of(size: int) -> TokenTable:
    pieces = [bytes([65 + index % 26, index]) for index in range(size)]
    no_merges = np.zeros((0, 2), np.int32)
    return TokenTable.build(pieces, [None] * size, [False] * size, no_merges, name="tiny", kind="byte-level")


def opened(config: PrecomputeConfig, table: TokenTable) -> Teacher:
    return open_teacher(config.teacher, config.codec, table)


def request(folder: Path, k: int) -> PrecomputeConfig:
    return PrecomputeConfig.from_flat(
        corpus="-", out="-", teacher=str(folder), k=k, max_tokens=60, temperatures=TEMPERATURES, dtype="float32"
    )


def full_rows(folder: Path, ids: NDArray[np.int32], dtype: torch.dtype) -> NDArray[np.float64]:
    """[R, U] log-probabilities of the whole head."""
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].double()
    dense: NDArray[np.float64] = torch.log_softmax(logits, dim=-1).numpy()
    return dense


def pack(rows: TeacherRows, k: int, min_p: float, size: int) -> Packed:
    return encode(rows, k=k, min_p=min_p, vocab_size=size, temperatures=TEMPERATURES)


def assert_rest(packed: Packed, dense_RU: NDArray[np.float64]) -> None:
    """The stored REST is the mass of all but the stored ids, at each temperature."""
    offsets = decode(packed.kept, packed.topk_ids, packed.topk_gap, packed.rest_gap).offsets
    assert packed.tau_rest_odds is not None
    for tau in TEMPERATURES:
        found_R = decode_tau_tail(packed.tau_rest_odds, [1.0, *TEMPERATURES], tau, STEP)
        assert len(found_R) == len(dense_RU)
        for r, row_U in enumerate(np.exp(torch.log_softmax(torch.from_numpy(dense_RU) / tau, -1).numpy())):
            rest = np.delete(row_U, packed.topk_ids[offsets[r] : offsets[r + 1]]).sum()
            assert math.exp(found_R[r]) == pytest.approx(rest, rel=STEP / 2 + CLOSE, abs=NOISE)


@pytest.mark.parametrize("head_scale", [1.0, 40.0])
def test_a_small_model_truncated_padded_and_whole(tmp_path: Path, head_scale: float) -> None:
    folder = tiny(tmp_path, head_scale)
    ids = np.random.default_rng(0).integers(0, 97, 50, dtype=np.int32)
    dense_RU = full_rows(folder, ids, torch.float64)
    (rows,) = opened(request(folder, 9), table_of(97)).rows([ids])
    assert_rest(pack(rows, 9, 0.003, 97), dense_RU)
    (rows,) = opened(request(folder, VOCAB), table_of(VOCAB)).rows([ids])
    whole = pack(rows, VOCAB, 0.0, VOCAB)
    assert whole.kept.tolist() == [VOCAB] * 49
    assert whole.tau_rest_odds is not None
    assert (whole.tau_rest_odds == -32768).all()
    # the head's last four rows are no tokens of the tokenizer: they are REST, and nothing else is
    assert_rest(pack(rows, VOCAB, 0.0, 97), dense_RU)


@pytest.mark.thorough
def test_a_real_model(smollm2_dir: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_dir))
    (encoded,) = tokenizer.encode_batch([TEXT], [True], keep_text=True)
    ids = encoded.ids.astype(np.int32)
    (rows,) = opened(request(smollm2_dir, 64), tokenizer.table).rows([ids])
    packed = pack(rows, 64, 0.003, tokenizer.table.size)
    assert 1 <= packed.kept.min() < 20 < packed.kept.max()
    assert_rest(packed, full_rows(smollm2_dir, ids, torch.float32))
