"""The toy teacher is an exact distribution: compared with its whole row, asked for with k = vocabulary."""

import subprocess
import sys

import numpy as np
import pytest

from xtoken.pipeline.teachers import open_teacher
from xtoken.pipeline.teachers.fake_teacher import FakeTeacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TeacherInfo

INFO = TeacherInfo(
    model="toy",
    backend="fake",
    vocab_rows=1,
    context=1,
    dtype="x",
    head_dtype="x",
    device="cpu",
    capture_path="fake",
    engine_version="1",
)


def teacher(size: int, k: int, temperatures: tuple[float, ...] = ()) -> FakeTeacher:
    return FakeTeacher(INFO, k, np.random.default_rng(size).random(size) < 0.3, temperatures)


@pytest.mark.parametrize("size", [2, 9, 256, 1000, 3001])
def test_every_figure_follows_from_the_whole_row(size):
    ids = np.random.default_rng(0).integers(0, size, 40).astype(np.int32)
    whole = teacher(size, size)
    full = whole.rows([ids])[0]
    space = np.random.default_rng(size).random(size) < 0.3
    dense = np.full((39, size), np.nan)
    np.put_along_axis(dense, full.ids.astype(np.int64), full.logprob.astype(np.float64), axis=1)
    assert not np.isnan(dense).any(), "each token stands once in the ranking"
    np.testing.assert_allclose(np.exp(dense).sum(axis=1), 1.0, atol=2e-6)
    position = np.arange(39)
    np.testing.assert_allclose(full.target_logprob, dense[position, ids[1:]], atol=1e-6)
    order = np.lexsort((np.broadcast_to(np.arange(size), dense.shape), -dense), axis=1)
    np.testing.assert_array_equal(full.ids, order)
    rank = (order == ids[1:, None]).argmax(axis=1) + 1
    np.testing.assert_array_equal(full.target_rank, rank)
    with np.errstate(divide="ignore"):
        expected = np.log((np.exp(dense) * space).sum(axis=1))
    np.testing.assert_allclose(full.space_logprob, expected, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 200])
def test_k_cuts_the_same_ranking(k):
    ids = np.array([5, 300, 1, 999, 5, 300, 1], np.int32)
    some, full = teacher(1000, k).rows([ids])[0], teacher(1000, 1000).rows([ids])[0]
    np.testing.assert_array_equal(some.ids, full.ids[:, :k])
    np.testing.assert_array_equal(some.logprob, full.logprob[:, :k])
    # the last two tokens decide: rows after (300, 1) agree
    again = teacher(1000, k).rows([np.array([300, 1, 7], np.int32), ids])
    np.testing.assert_array_equal(again[1].ids, some.ids)
    np.testing.assert_array_equal(again[0].ids[1], some.ids[2])


@pytest.mark.parametrize("size", [2, 256, 3001])
def test_normalisers_follow_from_the_whole_row(size):
    ids = np.random.default_rng(0).integers(0, size, 40).astype(np.int32)
    temperatures = (0.5, 2.0, 4.0)
    full, some = (teacher(size, k, temperatures).rows([ids])[0] for k in (size, 1))
    expected = [np.logaddexp.reduce(full.logprob.astype(np.float64) / tau, axis=1) for tau in temperatures]
    assert full.tau_lognorm.dtype == np.float32
    np.testing.assert_allclose(full.tau_lognorm, np.stack(expected, axis=1), atol=5e-6, rtol=0)
    np.testing.assert_array_equal(some.tau_lognorm, full.tau_lognorm)
    plain = teacher(size, size).rows([ids])[0]
    assert plain.tau_lognorm is None
    np.testing.assert_array_equal(plain.logprob, full.logprob)


def test_long_sequences_are_the_sum_of_their_blocks():
    ids = np.random.default_rng(1).integers(0, 500, 1500).astype(np.int32)
    whole, tail = teacher(500, 8).rows([ids])[0], teacher(500, 8).rows([ids[600:]])[0]
    np.testing.assert_array_equal(whole.ids[601:], tail.ids[1:])
    np.testing.assert_array_equal(whole.target_rank[601:], tail.target_rank[1:])


def test_opened_by_name_without_torch():
    config = PrecomputeConfig.from_flat(corpus="x", teacher="bytes", out="y", backend="fake", k=255)
    found = open_teacher(config.teacher, config.codec, load_tokenizer("bytes").table)
    assert found.info.vocab_rows == 256
    code = (
        "import sys, pipeline.teachers.fake_teacher; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_k_larger_than_the_vocabulary():
    from dataclasses import replace

    table = load_tokenizer("bytes").table
    small = replace(table, role=table.role[:10])
    config = PrecomputeConfig.from_flat(corpus="x", teacher="bytes", out="y", backend="fake", k=11)
    with pytest.raises(XtokenError, match="--k 11 is more than the vocabulary's 10 tokens"):
        open_teacher(config.teacher, config.codec, small)
