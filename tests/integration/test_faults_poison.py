"""A document that breaks the tokenizer, the engine or the process costs its own shard, and only until it is mended."""

import re
from pathlib import Path

import pytest
from fault_runs import Run, files, same_as

from xtoken.pipeline.store.publish import committed
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.manifest import CaptureManifest, read_manifest

# In one document of the corpus only: a line of argparse's.
WORD = "class BooleanOptionalAction(Action):"
ATTEMPTS = 3
SAID = {
    ("tokenizer", "raise"): "the tokenizer is broken",
    ("tokenizer", "panic"): "index out of bounds",
    ("engine", "raise"): "the engine is broken",
    ("engine", "panic"): "index out of bounds",
    ("engine", "die"): "signal 9",
}


def guilty(config) -> int:
    """The shard that the document with the word is in."""
    from xtoken.pipeline.store.reader import iter_capture

    found = [
        index
        for index in committed(config.out)
        for batch in iter_capture(config.out, ["text"], [index])
        if any(WORD in text for text in batch["text"].to_pylist())
    ]
    assert len(set(found)) == 1
    return found[0]


@pytest.mark.parametrize(("where", "what"), SAID)
def test_one_document_costs_one_shard(undisturbed, tmp_path, figure, where, what):
    shard, parts = guilty(undisturbed), committed(undisturbed.out)
    out, hits = tmp_path / "out", tmp_path / "hits"
    hits.mkdir()
    # one worker: what is in the engine beside the guilty one is known
    config = undisturbed.changed(out=str(out), workers=1)
    run = Run(config, tmp_path, job={"folder": str(hits), "word": WORD, where: what})
    error = run.finish(code=4)
    assert re.search(rf"1 of {len(parts)} shards were quarantined after three attempts", error), error
    assert f"shard {shard}: " in error
    assert SAID[where, what] in error
    assert set(committed(str(out))) == set(parts) - {shard}
    assert set(read_manifest(str(out), CaptureManifest).set_aside) == {shard}
    verify(str(out))
    tries = len(list(hits.glob(f"{where}-{what}-*")))
    assert tries == ATTEMPTS
    whole = files(Path(undisturbed.out))
    assert all(whole[name] == content for name, content in files(out).items())
    (hits / "fixed").touch()
    run.finish()
    same_as(Path(undisturbed.out), out)
    figure(f"poison: {where} {what}s at one document: {tries} attempts, {len(parts) - 1} of {len(parts)} parts there")
