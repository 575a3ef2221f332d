"""The share of a teacher's rows that losses without REST never see, from the lists alone."""

import numpy as np
import pytest

from xtoken.schemas.missing_mass import lacking_columns, lacking_note


def test_only_lists_of_whole_rows_at_another_temperature_are_looked_at() -> None:
    assert lacking_columns("uld", 2.0, "last") == ["uld_count", "uld_logprob"]
    assert lacking_columns("gold", 0.5, "first")[::2] == ["gold_count", "gold_other_count"]
    for loss, tau, merge in (
        ("uld", 1.0, "first"),
        ("h-kl", 2.0, "mean"),
        ("p-kl", 2.0, "first"),
        ("ce", 2.0, "first"),
        ("strict", 2.0, "first"),
        ("mined", 2.0, "first"),
    ):
        assert not lacking_columns(loss, tau, merge)


def test_the_share_is_that_of_rows_that_are_there() -> None:
    """Three rows of mass .5, .9 and .7 over two lists, and a chunk without one."""
    lists = [np.array([1, 1, 0, 0]), np.log([0.3, 0.9]), np.array([1, 0, 2, 0]), np.log([0.2, 0.6, 0.1])]
    values = dict(zip(lacking_columns("gold", 2.0, "first"), lists, strict=True))
    note = lacking_note("t", ["gold"], 2.0, values)
    assert note is not None
    assert note.startswith(
        "t: at --tau 2 the stored rows lack 30% of the teacher's probability, which gold takes for 0"
    )
    both = lacking_note("t", ["gold", "uld"], 2.0, values)
    assert both is not None
    assert "which gold, uld take for 0: their gradient" in both


@pytest.mark.parametrize("values", [([2, 1], [0.7, 0.299, 1.0]), ([0, 0], [])])
def test_little_is_not_worth_a_word(values: tuple[list[int], list[float]]) -> None:
    given = {"uld_count": np.array(values[0]), "uld_logprob": np.log(np.array(values[1]))}
    assert lacking_note("t", ["uld"], 2.0, given) is None
