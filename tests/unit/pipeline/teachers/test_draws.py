"""Systematic sampling against its definition, its mean over the uniform number, and real rows of a real model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xtoken.pipeline.teachers import check_backend, open_teacher
from xtoken.pipeline.teachers.base import Draws
from xtoken.pipeline.teachers.draws import Sampler, counted, cut_draws, draw_row, join_draws
from xtoken.pipeline.teachers.fake_teacher import FakeTeacher
from xtoken.pipeline.teachers.logit_rows import RowReader, cut, draw, join
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
SPACES = torch.arange(1)
PINNED = [0.4284327924493805, 0.2643821990415808, 0.8985486340298067, 0.028019783281127086, 0.10984591372571784]


def dense(found: Draws, size: int) -> NDArray[np.int64]:
    """[R, U] draws of each id."""
    row_K = np.repeat(np.arange(len(found.drawn)), found.drawn)
    count_RU = np.zeros((len(found.drawn), size), np.int64)
    np.add.at(count_RU, (row_K, found.ids), found.count)
    return count_RU


def drawn(logprob_RU: torch.Tensor, uniform_R: NDArray[np.float64], sampler: Sampler) -> Draws:
    ids_RD, entropy_R = draw(logprob_RU, uniform_R, sampler)
    return counted(ids_RD.numpy().astype(np.int32), entropy_R.numpy())


def spiky(size: int, seed: int) -> NDArray[np.float64]:
    """A distribution with a long tail and a few zeros."""
    rng = np.random.default_rng(seed)
    p_U = rng.dirichlet(np.full(size, 0.05)) if size < 1000 else rng.pareto(0.8, size)
    if size > 2:
        p_U[rng.integers(0, size, size // 3)] = 0.0
        p_U[size // 2] += 0.1
    return p_U / p_U.sum()


@pytest.mark.parametrize("size", [1, 2, 7, 255, 256, 257, 5000])
@pytest.mark.parametrize("draws", [1, 50, 1000])
def test_the_mean_over_the_uniform_number_is_the_row(size, draws):
    p_U, grid = spiky(size, size + draws), 400
    total_U = np.zeros(size)
    for uniform in (np.arange(grid) + 0.5) / grid:
        count_U = np.bincount(draw_row(p_U, uniform, draws), minlength=size)
        assert count_U.sum() == draws
        assert (np.abs(count_U - draws * p_U) < 1 + 1e-9).all()
        assert (count_U[p_U == 0] == 0).all()
        total_U += count_U
    # each count is a step function of the number with at most two steps: the grid misses less than one point of each
    np.testing.assert_allclose(total_U / grid, draws * p_U, atol=2 / grid)


@settings(deadline=None, max_examples=200)
@given(size=st.integers(1, 60), draws=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_draws_are_differences_of_floors(size: int, draws: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p_U, uniform = spiky(size, seed), float(rng.random())
    running_U = np.cumsum(p_U)
    level_U = draws * running_U / running_U[-1] + uniform
    if (np.abs(level_U[:-1] - np.round(level_U[:-1])) < 1e-9).any():
        return  # on a step rounding decides
    expected = np.diff(np.minimum(np.floor(level_U), draws), prepend=0)
    np.testing.assert_array_equal(np.bincount(draw_row(p_U, uniform, draws), minlength=size), expected)


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("draws", [1, 1000])
def test_numbers_at_the_ends_of_their_range(uniform, draws):
    for p_U in (np.array([1.0]), np.array([0.0, 1.0]), np.array([1.0, 0.0]), np.full(300_000, 1 / 300_000)):
        ids = draw_row(p_U, uniform, draws)
        assert len(ids) == draws
        assert (p_U[ids] > 0).all()


@pytest.mark.parametrize("size", [1, 5, 300, 300_000])
def test_torch_draws_the_same(size):
    rows, draws = 20, 37
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)) * 3
    logits[0, 1:] = float("-inf")
    uniform_R = np.random.default_rng(size).random(rows)
    found = drawn(torch.log_softmax(logits, -1), uniform_R, Sampler(draws, 0, size))
    p_RU = np.exp(torch.log_softmax(logits, -1).double().numpy())
    for row in range(rows):
        ids, count = np.unique(draw_row(p_RU[row], uniform_R[row], draws), return_counts=True)
        order = np.lexsort((ids, -count))
        start = int(found.drawn[:row].sum())
        span = slice(start, start + int(found.drawn[row]))
        np.testing.assert_array_equal(found.ids[span], ids[order])
        np.testing.assert_array_equal(found.count[span], count[order])
    p_RU /= p_RU.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy_R = -np.where(p_RU > 0, p_RU * np.log(p_RU), 0.0).sum(axis=1)
    np.testing.assert_allclose(found.entropy, entropy_R, rtol=1e-5, atol=1e-6)
    assert found.entropy.dtype == np.float32
    assert found.entropy[0] == 0


def test_a_padded_head_is_never_drawn_and_the_rest_is_renormalised():
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0, 9.0]]).repeat(400, 1)
    target, grid_R = torch.zeros(400, dtype=torch.int64), (np.arange(400) + 0.5) / 400
    rows = RowReader(1, SPACES, sampler=Sampler(30, 0, 3)).read(logits.clone(), target, grid_R)
    p_U = torch.softmax(logits[0, :3].double(), -1).numpy()
    assert rows.draws is not None
    count_RU = dense(rows.draws, 5)
    assert (count_RU[:, 3:] == 0).all()
    np.testing.assert_allclose(count_RU.mean(axis=0)[:3], 30 * p_U, atol=2 / 400)
    np.testing.assert_allclose(rows.draws.entropy, -(p_U * np.log(p_U)).sum(), rtol=1e-5)
    # figures of the token in the text stay those of the whole head
    assert rows.target_logprob[0] < -9
    nothing = torch.tensor([[float("-inf"), float("-inf"), 1.0]])
    with pytest.raises(XtokenError, match="no mass on the tokenizer's 2 tokens"):
        RowReader(1, SPACES, sampler=Sampler(3, 0, 2)).read(nothing, target[:1], grid_R[:1])


def test_numbers_follow_from_seed_and_tokens_alone():
    ids = np.array([5, 3, 1, 4, 1, 5], np.int32)
    found = Sampler(10, 7, 100).uniforms(ids)
    assert found.shape == (5,)
    assert ((found >= 0) & (found < 1)).all()
    # written down: a release that draws other numbers would break the resuming of captures
    np.testing.assert_allclose(found, PINNED, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(found, Sampler(99, 7, 5).uniforms(ids.astype(np.int64)))
    np.testing.assert_array_equal(found, Sampler(99, 7, 5).uniforms(np.repeat(ids, 2)[::2]))
    others = [Sampler(10, 8, 100).uniforms(ids), Sampler(10, 7, 100).uniforms(ids[::-1])]
    assert all((found != other).all() for other in others)
    many = Sampler(1, 0, 1).uniforms(np.arange(20_001, dtype=np.int32))
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03


def test_draws_are_joined_and_cut():
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    target, uniform_R = torch.zeros(9, dtype=torch.int64), np.random.default_rng(2).random(9)
    reader = RowReader(1, SPACES, sampler=Sampler(12, 0, 40))
    whole = reader.read(logits.clone(), target, uniform_R).draws
    parts = [slice(0, 4), slice(4, 5), slice(5, 9)]
    pieces = [reader.read(logits[part].clone(), target[part], uniform_R[part]) for part in parts]
    joined = join(pieces)
    assert whole is not None
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(joined.draws, name), value)
        np.testing.assert_array_equal(getattr(cut(joined, 4, 9).draws, name), getattr(cut_draws(whole, 4, 9), name))
    np.testing.assert_array_equal(dense(cut_draws(whole, 4, 9) or whole, 40), dense(whole, 40)[4:])
    assert join_draws([None, None]) is None
    assert cut_draws(None, 0, 1) is None
    plain = RowReader(1, SPACES).read(logits.clone(), target)
    assert plain.draws is cut(plain, 0, 3).draws is join([plain, plain]).draws is None


def test_draws_stand_with_the_most_drawn_first_then_by_id():
    found = counted(np.array([[0, 3, 3, 7], [2, 2, 2, 2], [1, 4, 5, 5]], np.int32), np.zeros(3, np.float32))
    assert found.drawn.tolist() == [3, 1, 3]
    assert found.ids.tolist() == [3, 0, 7, 2, 5, 1, 4]
    assert found.count.tolist() == [2, 1, 1, 4, 2, 1, 1]


@pytest.mark.parametrize("size", [2, 256, 3001])
def test_the_toy_teacher_draws_from_its_whole_row(size):
    ids = np.random.default_rng(size).integers(0, size, 12).astype(np.int32)
    space_U = np.random.default_rng(size).random(size) < 0.3
    full = FakeTeacher(INFO, size, space_U).rows([ids])[0]
    p_RU = np.zeros((11, size))
    np.put_along_axis(p_RU, full.ids.astype(np.int64), np.exp(full.logprob.astype(np.float64)), axis=1)
    total_RU = np.zeros((11, size))
    for seed in range(60):
        (rows,) = FakeTeacher(INFO, 1, space_U, sampler=Sampler(40, seed, size)).rows([ids])
        assert rows.draws is not None
        count_RU = dense(rows.draws, size)
        assert (count_RU.sum(axis=1) == 40).all()
        assert (np.abs(count_RU - 40 * p_RU) < 1 + 1e-4).all()
        total_RU += count_RU
    # a count is one of two neighbouring integers: its standard deviation is at most a half
    np.testing.assert_allclose(total_RU / 60, 40 * p_RU, atol=5 * 0.5 / np.sqrt(60))
    np.testing.assert_allclose(rows.draws.entropy, -(p_RU * np.log(p_RU)).sum(axis=1), atol=1e-4)
    np.testing.assert_array_equal(rows.target_rank, full.target_rank)
    np.testing.assert_array_equal(rows.space_logprob, full.space_logprob)
    assert rows.ids.shape == (11, 1)


@pytest.mark.usefixtures("vllm_gives_the_top_k")
def test_an_engine_of_top_k_and_other_temperatures_are_refused_by_name():
    asked = {"corpus": "x", "teacher": "absent", "out": "y", "codec": "sampled"}
    config = PrecomputeConfig.from_flat(**asked, backend="vllm")
    for check in (check_backend, lambda *asked: open_teacher(*asked, load_tokenizer("bytes").table)):
        with pytest.raises(XtokenError, match=r"--codec sampled.*'vllm'.*--backend hf or vllm, or --codec topk"):
            check(config.teacher, config.codec)
    with pytest.raises(ValueError, match="--temperatures 2 needs --codec topk"):
        PrecomputeConfig.from_flat(**asked, temperatures=[2])


def test_an_engines_draws_depend_on_batches_by_rounding_only(tmp_path, tokenizer_file):
    tokenizer = load_tokenizer(str(tokenizer_file("smollm2")))
    config = PrecomputeConfig.from_flat(corpus="x", teacher=str(tmp_path), out="y", codec="sampled", draws=50)
    save_tiny_model(tmp_path, tokenizer.table.size + 64)
    texts = ["Call me Ishmael. Some years ago", "42 lines;\n  return x", "naïve 日本", "x y"]
    sequences = [tokenizer.encode(text, complete=False).ids for text in texts]
    together, alone = (
        open_teacher(config.changed(batch_tokens=tokens).teacher, config.codec, tokenizer.table).rows(sequences)
        for tokens in (2048, 3)
    )
    same = total = 0
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.draws is not None
        assert theirs.draws is not None
        np.testing.assert_allclose(ours.draws.entropy, theirs.draws.entropy, atol=1e-4)
        moved_R = np.abs(dense(ours.draws, 10**5) - dense(theirs.draws, 10**5)).sum(axis=1)
        # a count changes where rounding carries a bound over a step, hence by one draw, and seldom
        assert moved_R.max() <= 2
        same, total = same + int((moved_R == 0).sum()), total + len(moved_R)
    assert total > 15
    assert same >= 0.9 * total


def save_tiny_model(folder: Path, width: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=width,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=1.0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.mark.thorough
@pytest.mark.engine
def test_a_real_models_draws_are_its_softmax_in_the_mean(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    draws, seeds = 50, 24
    tokenizer = load_tokenizer(str(smollm2_dir))
    ids = tokenizer.encode("In the beginning 50 draws; naïve, 日本", complete=False).ids
    config = PrecomputeConfig.from_flat(corpus="x", teacher=str(smollm2_dir), out="y", codec="sampled", draws=draws)
    teacher, size = open_teacher(config.teacher, config.codec, tokenizer.table), tokenizer.table.size
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        logp_RU = model(torch.from_numpy(ids)[None].long()).logits[0, :-1, :size].log_softmax(-1)
    p_RU, mean_RU = logp_RU.double().exp().numpy(), np.zeros(logp_RU.shape)
    short, found = (rows.draws for rows in teacher.rows([ids[:5], ids]))
    assert found is not None
    assert short is not None
    for seed in range(seeds):
        if seed:  # the engine itself draws once, of the same rows
            sampler = Sampler(draws, seed, size)
            found = drawn(logp_RU, sampler.uniforms(ids), sampler)
        count_RU = dense(found, size)
        assert (count_RU.sum(axis=1) == draws).all()
        assert (np.abs(count_RU - draws * p_RU) < 1 + 1e-2).all()
        mean_RU += count_RU / seeds
        np.testing.assert_allclose(found.entropy, -(p_RU * logp_RU.numpy()).sum(axis=1), atol=2e-3)
    assert (dense(short, size).sum(axis=1) == draws).all()
    # one of two neighbouring integers: the variance is f (1 - f) of the fraction
    fraction_RU = draws * p_RU % 1
    deviation_RU = np.sqrt(fraction_RU * (1 - fraction_RU) / seeds)
    often_RU = deviation_RU > 0.04
    error_RU = (mean_RU - draws * p_RU)[often_RU] / deviation_RU[often_RU]
    assert len(error_RU) > 100
    assert np.abs(error_RU).max() < 6
    assert 0.8 < error_RU.std() < 1.2
