"""A codec is one file and one line: ``dense`` of tests/dense_codec.py goes all the way that the published ones go.

Every place that depends on how rows are stored must ask the codec, or one of these steps would not know it.
"""

import ast
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from xtoken import pipeline
from xtoken.pipeline.align.run import align
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.executors.protocol import Job, Lease, Message, Watch
from xtoken.pipeline.page.sample_page import write_page
from xtoken.pipeline.project.mass import teacher_mass
from xtoken.pipeline.query import query
from xtoken.pipeline.share.card.card import card_files
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.reader import iter_capture
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.teachers import check_backend, open_teacher
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas import codecs
from xtoken.schemas.codecs import CODECS, Registered
from xtoken.schemas.configs.artifacts import AlignConfig, InspectConfig, QueryConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.share import PullConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

LICENSES = {"corpus": "cc-by-4.0", "outputs": "gemma"}
TINY = Path(__file__).parents[3] / "golden" / "captures" / "tiny"
TEXTS = ["The river runs to the sea. " * 4, "x", "naïve café and 42 gammas"]
VOCAB, HEAD = 400, 408  # the head is padded, as many are


class Here:
    """Runs the shards in this process: workers of their own would not know a codec that a test registered."""

    def run(self, job: Job, shards: Sequence[int], watch: Watch) -> dict[int, str]:
        del watch
        failed: dict[int, str] = {}

        def send(message: Message) -> None:
            if message.kind == "failed":
                failed[message.shard] = str(message.error)

        job.open().serve((Lease(shard, 1) for shard in shards), send)
        return failed


@pytest.fixture(autouse=True)
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line."""
    monkeypatch.setitem(CODECS, "dense", Registered("dense_codec", whole_rows=True))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of two small layers with the tokenizer of the golden captures."""
    root = tmp_path_factory.mktemp("model")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.25}
    torch.manual_seed(7)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=HEAD, **sizes)).save_pretrained(root)
    for file in TINY.iterdir():
        shutil.copy(file, root)
    return str(root)


@pytest.fixture(params=["fake", "hf"])
def config(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: str) -> PrecomputeConfig:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "corpus.jsonl"),
        teacher=tiny_model,
        backend=request.param,
        out=str(tmp_path / "capture"),
        codec="dense",
        max_tokens=32,
        shard_bytes=100,
        dtype="float32",
        device="cpu",
    )


@pytest.fixture
def capture(config: PrecomputeConfig) -> CaptureManifest:
    return precompute(config, Silent(), executor=Here())


def ask(path: str, sql: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = query(QueryConfig(path=path, sql=sql))["rows"]
    return rows


def test_from_the_teacher_to_targets(config: PrecomputeConfig, capture: CaptureManifest, tmp_path: Path) -> None:
    root, codec = config.out, open_codec(capture.codec)
    assert (capture.codec.name, capture.codec.k, capture.codec.draws) == ("dense", 0, 0)
    rows = sum(part.rows for part in capture.parts)
    assert verify(root)["entries"] == rows * VOCAB

    # what is read back is what the teacher says
    table = load_tokenizer(config.teacher.teacher).table
    teacher, bos = open_teacher(config.teacher, config.codec, table), [table.info.bos_id] if capture.bos else []
    seen = 0
    for batch in iter_capture(root):
        decoded, at = codec.decode(batch), 0
        for ids in batch["teacher_ids"].to_pylist():
            if len(bos + ids) < 2:
                continue
            (whole,) = teacher.rows([np.array(bos + ids, np.int32)])
            for row in range(len(whole.ids)):
                here = slice(decoded.offsets[at], decoded.offsets[at + 1])
                wanted = np.full(HEAD, np.nan)
                wanted[whole.ids[row]] = whole.logprob[row].astype(np.float16)
                assert sorted(decoded.ids[here]) == list(range(VOCAB))
                # of the hf teacher, sequences met others in their batch than here: float32 sums differ a little
                slack = 0 if config.teacher.backend == "fake" else 2**-7
                np.testing.assert_allclose(decoded.logprob[here], wanted[decoded.ids[here]], atol=slack, rtol=0)
                at += 1
            seen += len(whole.ids)
    assert seen == rows > 40

    # queries see it: the view _rows and what stands on it
    entries = "SELECT count(*) AS n, min(rank) AS low, max(rank) AS high FROM entries"
    assert ask(root, entries) == [{"n": rows * VOCAB, "low": 0, "high": VOCAB - 1}]
    mass = ask(root, "SELECT sum(share) AS share, count(*) AS tokens FROM mass")
    assert mass[0]["tokens"] == VOCAB
    assert mass[0]["share"] == pytest.approx(1.0)
    assert ask(root, "SELECT max(kept) AS kept, max(rest) AS rest FROM tokens") == [{"kept": VOCAB, "rest": 0.0}]

    # people see it: the card, inspect, a sample's page
    card = card_files(root, capture, LICENSES, None)["README.md"].decode()
    for words in (
        "codec `dense`: the whole distribution in float16",
        "Nothing was left out.",
        "dense_codes",
        "bits of",
    ):
        assert words in card
    assert inspect(root)["samples_shown"][0]["row"]["teacher"]
    page = str(tmp_path / "page.html")
    name = next(iter_capture(root))["sample_id"][0].as_py()
    assert write_page(InspectConfig(path=root, html=name, out=page))["teacher_tokens"] > 1
    assert '"dense":true' in Path(page).read_text(encoding="utf-8").replace(" ", "")

    # and it becomes targets
    found = teacher_mass(root, 10**6)
    assert found is not None
    assert (found.not_kept, found.rows) == (0.0, rows)
    out = str(tmp_path / "targets")
    asked = AlignConfig(captures=[root], student="bytes", out=out, losses=["p-kl", "h-kl", "alm"])
    targets = align(asked, Silent(), executor=Here())
    assert targets.codec == "dense"
    assert verify(out)["samples"] == sum(part.samples for part in capture.parts)


def test_another_codec_is_another_run(config: PrecomputeConfig, capture: CaptureManifest) -> None:
    with pytest.raises(XtokenError, match="codec: 'dense' there, None now"):
        precompute(config.changed(codec="topk"), Silent(), executor=Here())
    assert precompute(config, Silent(), executor=Here()).run_hash == capture.run_hash


def test_a_subset_without_rows(config: PrecomputeConfig, capture: CaptureManifest, tmp_path: Path) -> None:
    bare = str(tmp_path / "bare")
    pull(PullConfig(source=config.out, destination=bare, columns=["text"]), Silent())
    assert {"dense_codes", "dense_half"} < set(read_manifest(bare, CaptureManifest).left_out)
    assert verify(bare)["entries"] == 0
    assert sum(batch.num_rows for batch in iter_capture(bare)) == sum(part.samples for part in capture.parts)
    targets = AlignConfig(captures=[bare], student="bytes", out=str(tmp_path / "targets"), losses=["ce"])
    align(targets, Silent(), executor=Here())


def test_a_damaged_row_is_refused(config: PrecomputeConfig, capture: CaptureManifest) -> None:
    codec = open_codec(capture.codec)
    batch = next(iter_capture(config.out))
    lengths = np.array([len(row) for row in batch["realised_logprob"].to_pylist()])
    assert codec.check(batch, lengths, VOCAB).sum() == len(codec.decode(batch).ids)
    with pytest.raises(VerificationError, match="does not hold the whole vocabulary"):
        codec.check(batch, lengths, VOCAB + 1)


def test_an_estimate_counts_its_entries(config: PrecomputeConfig) -> None:
    asked = config.changed(dry_run=True, pilot=True).model_copy(update={"out": ""})
    assert dry_run(asked, Silent())["entries_per_row"] == VOCAB


@pytest.mark.usefixtures("vllm_gives_the_top_k")
def test_a_backend_without_whole_rows_is_refused(config: PrecomputeConfig) -> None:
    with pytest.raises(XtokenError, match="--codec dense needs whole teacher rows, and backend 'vllm'"):
        check_backend(config.changed(backend="vllm").teacher, config.codec)


def test_options_of_other_codecs_are_refused(config: PrecomputeConfig) -> None:
    given = config.to_flat()
    for option in ({"k": 8}, {"min_p": 0.1}, {"draws": 3}, {"seed": 1}):
        with pytest.raises(ValueError, match="means nothing to --codec dense"):
            PrecomputeConfig.from_flat(**{**given, **option})


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(ValueError, match="'dens' is not a codec; expected one of topk, sampled, dense"):
        codecs.registered("dens")


def strings(path: Path) -> Iterator[str]:
    """Every string in a file that is compared with something, or is a key."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts: list[Any] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            parts = list(node.keys)
        elif isinstance(node, ast.Subscript):
            parts = [node.slice]
        for part in parts:
            for leaf in ast.walk(part) if part is not None else ():
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield leaf.value


def test_nobody_asks_for_a_codec_by_name() -> None:
    assert pipeline.__file__ is not None
    root = Path(pipeline.__file__).resolve().parent.parent
    registry = root / "schemas" / "codecs.py"
    files: list[Path] = [file for layer in ("pipeline", "schemas", "trainer") for file in (root / layer).rglob("*.py")]
    asking = [file for file in files if file != registry and {"topk", "sampled"} & set(strings(file))]
    assert asking == []
