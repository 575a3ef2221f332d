"""A backend is one module with ``open_teacher`` and one line of ``BACKENDS``: docs/extend.md, done from outside."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.executors.protocol import Event, Lease
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.teachers import BACKENDS, Backend
from xtoken.schemas.configs.capture import CodecGroup, PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent

TEXTS = [f"Document {number}: " + "some words, and 1234 numbers. " * (number + 1) for number in range(5)]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrecomputeConfig:
    """A run with the backend registered, its shards done in this process."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(BACKENDS, "toy", Backend("toy_backend", "", full_rows=False))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "corpus.jsonl"), teacher="bytes", out=str(tmp_path / "out"), k=8, min_p=0.0
    )
    toy = config.teacher.model_copy(update={"backend": "toy"})  # no field of ours knows its name
    return config.model_copy(update={"teacher": toy})


class HereExecutor:
    """One worker, in this process."""

    def __init__(self, *_: object) -> None: ...

    def run(self, job, shards, watch):
        def send(message):
            if message.kind == "part":
                watch.see(Event("part", shard=message.shard, part=message.part))

        job.open().serve((Lease(shard) for shard in shards), send)
        return {}


def test_a_registered_backend_captures(config, monkeypatch):
    monkeypatch.setattr(importlib.import_module("xtoken.pipeline.capture.precompute"), "LocalExecutor", HereExecutor)
    manifest = precompute(config, Silent())
    assert manifest.teacher.backend == "toy"
    assert verify(config.out)["text_bytes"] == sum(len(text) for text in TEXTS)
    batch = next(iter_capture(config.out))
    label_R = np.array(batch["teacher_ids"][0].as_py()[1:])
    harmonic = (1 / np.arange(1, manifest.teacher.vocab_rows + 1)).sum()
    expected_R = -np.log((label_R + 1) * harmonic)
    np.testing.assert_allclose(batch["realised_logprob"][0].as_py(), expected_R, rtol=1e-4)


def test_what_it_cannot_give_is_refused(config):
    with pytest.raises(XtokenError, match=r"--temperatures 2 needs .* backend 'toy'"):
        precompute(config.model_copy(update={"codec": CodecGroup(temperatures=[2.0])}), Silent())


def test_a_missing_library_is_named_with_its_install_line(config, monkeypatch):
    monkeypatch.setitem(BACKENDS, "toy", Backend("no_such_engine", "pip install 'xtoken[toy]'", full_rows=False))
    monkeypatch.setattr(importlib.import_module("xtoken.pipeline.capture.precompute"), "LocalExecutor", HereExecutor)
    with pytest.raises(XtokenError, match=r"backend 'toy' needs no_such_engine; install it: pip install 'xtoken\[toy"):
        precompute(config, Silent())
