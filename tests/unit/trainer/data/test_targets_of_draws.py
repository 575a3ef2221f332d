"""Targets of draws are trained only with what is linear in them; each refusal names the way out."""

from collections.abc import Callable
from typing import Any

import pytest

from xtoken.schemas.configs.train import LossOptions
from xtoken.schemas.errors import XtokenError
from xtoken.trainer.data.targets import Targets

LOSSES = ("p-kl", "sparse-kl", "byte-prefix", "alm")


@pytest.fixture
def drawn(make_targets: Callable[..., str]) -> Targets:
    return Targets(make_targets([[5, 4]], losses=LOSSES, codec="sampled"))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("p-kl", {"kl": "reverse"}, "use --kl forward"),
        ("sparse-kl", {"kl": "reverse"}, "use --kl forward"),
        ("p-kl", {"rest": "drop"}, "use --rest bucket"),
        ("sparse-kl", {"rest": "drop", "kl": "reverse"}, "use --kl forward.*use --rest bucket"),
        ("byte-prefix", {}, "use --prefix root"),
        ("byte-prefix", {"prefix": ["root", "interior"]}, "use --prefix root"),
        ("byte-prefix", {"prefix": ["child"]}, "use --prefix root"),
    ],
)
def test_what_is_not_linear_is_refused(drawn: Targets, loss: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(XtokenError, match=rf"built from draws \(codec sampled\): .*{message}") as caught:
        drawn.require_options(loss, LossOptions(**options))
    assert drawn.root in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("p-kl", {}),
        ("sparse-kl", {}),
        ("byte-prefix", {"prefix": ["root"]}),
        # options of other losses concern nobody
        ("p-kl", {"prefix": ["child"]}),
        ("alm", {"kl": "reverse", "rest": "drop"}),
        ("ce", {"kl": "reverse", "rest": "drop"}),
    ],
)
def test_what_is_linear_is_not(drawn: Targets, loss: str, options: dict[str, Any]) -> None:
    drawn.require_options(loss, LossOptions(**options))


def test_targets_of_the_most_probable_entries_are_trained_as_before(make_targets: Callable[..., str]) -> None:
    targets = Targets(make_targets([[5, 4]], losses=LOSSES))
    targets.require_options("p-kl", LossOptions(kl="reverse", rest="drop"))
    targets.require_options("byte-prefix", LossOptions())
