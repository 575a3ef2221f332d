"""What a capture says of itself in words."""

from xtoken.pipeline.store.figures import bos_figure
from xtoken.schemas.manifest import TokenizerInfo


def test_a_bos_that_is_declared_but_not_added_is_named() -> None:
    info = TokenizerInfo(name="t", hash="0", kind="byte-level", size=9, adds_bos=False, bos_id=7)
    assert "BOS (id 7) is declared, but" in bos_figure(info, shown=False)["bos"]
    assert "--bos never" in bos_figure(info.model_copy(update={"adds_bos": True}), shown=False)["bos"]
    assert bos_figure(info, shown=True) == {}
    for update in ({"bos_id": None}, {"eos_id": 7}):
        assert bos_figure(info.model_copy(update=update), shown=False) == {}
