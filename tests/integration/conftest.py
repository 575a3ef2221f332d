"""What several integration tests ask of a real model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from fault_runs import Run, documents, settings, write_corpus
from s3_server import S3Server, serve

from xtoken.schemas.configs.capture import PrecomputeConfig


def _forward(folder: Path, sequences: list[list[int]]) -> Iterator[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids in sequences:
        # Not around the yield: the mode would leak into whoever consumes this.
        with torch.inference_mode():
            rows = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1).numpy()
        yield rows


@pytest.fixture(autouse=True)
def _users_keep_apart() -> Iterator[None]:
    """s3fs keeps clients by what they were made with, and the keys in the environment are no part of that."""
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def log_probabilities() -> Callable[[Path, list[list[int]]], Iterator[Any]]:
    """``log_probabilities(folder, sequences)``: float64 [T - 1, V] of each, from the model's own forward pass."""
    return _forward


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started by the first test that asks for it."""
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def undisturbed(tokenizer_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> PrecomputeConfig:
    """Settings of a capture of real text that was left alone; what faults do to others is compared with it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    corpus = write_corpus(folder / "corpus.jsonl", documents())
    config = settings(corpus, tokenizer_file("smollm2"), folder / "undisturbed")
    Run(config, folder).finish()
    return config
