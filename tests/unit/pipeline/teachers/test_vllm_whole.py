"""Figures of whole rows go through the columns that vLLM carries and come back as transformers' rows have them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xtoken.pipeline.teachers.draws import Sampler
from xtoken.pipeline.teachers.vllm_replies import Entries
from xtoken.pipeline.teachers.vllm_whole import UNIFORMS, Figures, Whole, columns
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.capture import CodecGroup
from xtoken.schemas.errors import XtokenError

ROWS, SIZE = 40, 60
STARTS = np.arange(SIZE) % 3 == 0
KINDS = [
    Whole(5, STARTS),
    Whole(5, STARTS, (0.5, 2.0)),
    Whole(1, STARTS, (), Sampler(50, 7, SIZE - 4)),
    Whole(1, STARTS, (), Sampler(2, 7, SIZE)),  # fewer ids than floats
]


def logits(seed: int = 0) -> torch.Tensor:
    """With ties, also across the k-th place."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(ROWS, SIZE, generator=generator) * 2).round(decimals=0)


def reply(whole: Whole, uniform_N: NDArray[np.float64], logits_NU: torch.Tensor | None = None) -> Entries:
    """What vLLM hands over."""
    target_N = torch.arange(ROWS)
    taken = logits() if logits_NU is None else logits_NU
    found = whole.reader(torch.device("cpu")).figures(taken.clone(), target_N, uniform_N)
    ids_NW, float_NW = whole.packed(found, target_N)
    assert ids_NW.shape == float_NW.shape == (ROWS, 1 + whole.width)
    return ids_NW.numpy().astype(np.int32), float_NW.numpy(), found.target_rank.numpy().astype(np.int32)


@pytest.mark.parametrize("whole", KINDS)
def test_figures_are_those_of_the_reader_to_the_bit(whole: Whole) -> None:
    uniform_N = np.random.default_rng(3).random(ROWS)
    expected = whole.reader(torch.device("cpu")).read(logits(), torch.arange(ROWS), uniform_N)
    (ids_NK, logprob_NK, rank_N), found = whole.unpacked(reply(whole, uniform_N))
    np.testing.assert_array_equal(ids_NK, np.column_stack([np.arange(ROWS), expected.ids]))
    np.testing.assert_array_equal(logprob_NK, np.column_stack([expected.target_logprob, expected.logprob]))
    np.testing.assert_array_equal(rank_N, expected.target_rank)
    for name in ("lse", "space_logprob", "tau_lognorm"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    if expected.draws is None:
        assert found.draws is None
    else:
        assert found.draws is not None
        for name in vars(expected.draws):
            np.testing.assert_array_equal(getattr(found.draws, name), getattr(expected.draws, name))
    assert whole.broken(found) is None
    assert whole.misfit((ids_NK, logprob_NK, rank_N), found) is None


@pytest.mark.parametrize("whole", KINDS)
def test_a_worker_is_told_the_same(whole: Whole) -> None:
    sent = whole.wire()
    assert all(isinstance(one, int | bytes | list | None) for one in sent)
    again = Whole.from_wire(*sent)
    np.testing.assert_array_equal(again.starts_U, whole.starts_U)
    assert (again.k, again.temperatures, again.sampler) == (whole.k, whole.temperatures, whole.sampler)
    assert again.width == whole.width


def test_what_a_codec_asks_for() -> None:
    table = load_tokenizer("bytes").table
    for codec in (CodecGroup(k=9, temperatures=[2.0]), CodecGroup(codec="sampled", draws=30, seed=5)):
        whole = Whole.of(codec, table, table.size + 10)
        assert whole.width == (codec.settings.entries or 0) + columns(codec)
        assert (len(whole.starts_U), whole.starts_U.sum()) == (table.size + 10, 1)
    assert whole.sampler == Sampler(30, 5, table.size)
    ids = np.array([1, 2, 3], np.int32)
    assert (whole.uniforms(ids) or {})[UNIFORMS] == whole.sampler.uniforms(ids).tobytes()
    assert Whole.of(CodecGroup(), table, table.size).uniforms(ids) is None


def of(name: str, change: Callable[[Any], Any]) -> Callable[[Figures], Figures]:
    return lambda found: found._replace(**{name: change(getattr(found, name))})


@pytest.mark.parametrize(
    ("whole", "change", "message"),
    [
        (KINDS[0], of("space_logprob", lambda space: space - 3), "word begins"),
        (KINDS[0], of("space_logprob", lambda space: space + 1), "word begins"),
        (KINDS[0], of("space_logprob", lambda space: space * np.float32(np.nan)), "NaN"),
        (KINDS[0], of("space_logprob", lambda space: space + np.float32(np.inf)), "above 0"),
        (KINDS[1], of("tau_lognorm", lambda norms: norms[:, ::-1]), "temperature 0.5"),
        (KINDS[1], of("tau_lognorm", lambda norms: norms - [[0, 2]]), "temperature 2"),
        (KINDS[1], of("tau_lognorm", lambda norms: norms * np.nan), "normaliser is not finite"),
        (KINDS[2], of("draws", lambda draws: replace(draws, ids=draws.ids + 30)), "outside"),
        (KINDS[2], of("draws", lambda draws: replace(draws, ids=draws.ids * 0)), "as often"),
        (KINDS[2], of("draws", lambda draws: replace(draws, entropy=draws.entropy + 4)), "entropy"),
    ],
)
def test_figures_that_cannot_be_are_named(whole: Whole, change: Callable[[Figures], Figures], message: str) -> None:
    top, found = whole.unpacked(reply(whole, np.full(ROWS, 0.5)))
    wrong = change(found)
    assert message in (whole.broken(wrong) or whole.misfit(top, wrong) or "nothing")


def test_rows_that_are_no_distributions_are_refused_as_those_of_transformers() -> None:
    broken = logits()
    broken[3, 5] = float("nan")
    with pytest.raises(XtokenError, match="NaN or infinity"):
        KINDS[0].unpacked(reply(KINDS[0], np.full(ROWS, 0.5), broken))
    nothing = logits()
    nothing[2, : SIZE - 4] = float("-inf")
    with pytest.raises(XtokenError, match=f"no mass on the tokenizer's {SIZE - 4} tokens"):
        KINDS[2].unpacked(reply(KINDS[2], np.full(ROWS, 0.5), nothing))
