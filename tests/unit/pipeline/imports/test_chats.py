"""Rows with their conversations: a real chat template, answers alone taught, and the offset of generated answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from tests.distillkit_sets import QWEN3, Document, sampled
from tests.in_process import InThisProcess
from tests.unit.pipeline.imports.sets import config_of, drawn_rows
from xtoken.pipeline.align.run import align
from xtoken.pipeline.imports.run import import_dataset
from xtoken.pipeline.query.samples import Capture
from xtoken.pipeline.store.reader import iter_targets
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

ANSWERS = {
    "Name three colours.": "Red, green and blue are three colours that most people name first.",
    "How many legs has a spider?": "A spider has eight legs; insects have six.",
    "What is a river?": "A river is water that runs from the hills to the sea, past mills and boats.",
    "Write a function.": "def area(r):\n    return 3.14159 * r * r\n",
}
TALKS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in ANSWERS.items()
]
TOP = 20
Scored = tuple[list[Document], list[int], Any]


@pytest.fixture(scope="module")
def scored(smollm2_dir: Path) -> Scored:
    """Every conversation three times, as the template writes it, a row behind each token; and where answers begin."""
    tokenizer, rng = AutoTokenizer.from_pretrained(smollm2_dir), np.random.default_rng(0)
    documents, starts = [], []
    for talk in TALKS * 3:
        ids = tokenizer.apply_chat_template(talk, return_dict=False)
        asked = tokenizer.apply_chat_template(talk[:1], return_dict=False, add_generation_prompt=True)
        rows = drawn_rows(ids, len(tokenizer), rng)
        documents.append(Document(np.array(ids), np.concatenate([rows[1:], rows[:1]])))
        starts.append(len(asked))
    return documents, starts, tokenizer


def write_open_instruct(folder: Path, documents: list[Document], size: int) -> None:
    rows = [
        {**sampled(one, QWEN3, size), "messages": json.dumps(talk)}
        for one, talk in zip(documents, TALKS * 3, strict=True)
    ]
    byte_lists = pa.list_(pa.list_(pa.uint8()))
    kinds = {"input_ids": pa.list_(pa.uint64()), "messages": pa.string()}
    table = {name: pa.array([row[name] for row in rows], kinds.get(name, byte_lists)) for name in rows[0]}
    folder.mkdir()
    pq.write_table(pa.table(table), folder / "a.parquet")
    (folder / "compression_config.yaml").write_text(json.dumps({"d": size, **QWEN3}))


def write_axolotl(folder: Path, scored: Scored, *, late: int = 0, stop: bool = True) -> None:
    """Generated answers, ``late`` places late, with a row about the token that ends them or without."""
    documents, starts, tokenizer = scored
    rows = []
    for one, start, talk in zip(documents, starts, TALKS * 3, strict=True):
        ids = one.ids.tolist()
        end = ids.index(tokenizer.eos_token_id, start) + stop
        lists = []
        for at in range(start - late, end - late):
            row = one.logprob[at - 1]
            best = np.argsort(-row)[:TOP].tolist()
            if ids[at] not in best:  # a server lists what was sampled
                best[-1] = ids[at]
            lists.append([{"token": f"token_id:{token}", "logprob": float(row[token])} for token in best])
        rows.append({"messages": talk, "logprobs": lists})
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")


def taught(sample: Any) -> list[int]:
    return [
        token for token, row in zip(sample.token_ids.tolist(), sample.row_of_token.tolist(), strict=True) if row >= 0
    ]


def test_rows_with_messages_teach_answers_alone(scored: Scored, smollm2_dir: Path, tmp_path: Path) -> None:
    documents, starts, tokenizer = scored
    write_open_instruct(tmp_path / "set", documents, len(tokenizer))
    config = config_of(tmp_path / "set", tmp_path / "out", tokenizer=str(smollm2_dir))
    assert import_dataset(config, Silent())["form"] == "messages"
    verify(str(tmp_path / "out"))
    for sample, one, start, talk in zip(Capture(str(tmp_path / "out")), documents, starts, TALKS * 3, strict=True):
        ids = one.ids.tolist()
        end = ids.index(tokenizer.eos_token_id, start) + 1
        assert sample.conversation == {"messages": talk}
        assert taught(sample) == ids[start:end]
        for row in range(len(sample.offsets) - 1):
            shown, logprob, _ = sample.row(row)
            np.testing.assert_allclose(logprob, one.logprob[start - 1 + row][shown], atol=1 / 64 + 1e-4)
    config = AlignConfig(
        captures=[str(tmp_path / "out")], student=str(smollm2_dir), out=str(tmp_path / "t"), losses=["p-kl", "gold"]
    )
    align(config, Silent(), executor=InThisProcess())
    verify(str(tmp_path / "t"))
    rows = [row for batch in iter_targets(str(tmp_path / "t")) for row in batch.to_pylist()]
    unknown = sum(np.isneginf(row["teacher_logprob"]).sum() for row in rows)
    assert unknown > 0
    for row in rows:  # a label that nobody knows makes no gap
        has_target = ~np.isnan(row["teacher_logprob"])
        np.testing.assert_array_equal(np.array(row["pkl_count"]) > 0, has_target)


def test_rows_whose_template_writes_other_ids_are_named(scored: Scored, smollm2_dir: Path, tmp_path: Path) -> None:
    documents, _, tokenizer = scored
    other = [Document(np.where(np.arange(len(documents[0].ids)) == 4, 99, documents[0].ids), documents[0].logprob)]
    write_open_instruct(tmp_path / "set", other + documents[1:], len(tokenizer))
    import_dataset(config_of(tmp_path / "set", tmp_path / "out", tokenizer=str(smollm2_dir)), Silent())
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["sample_id"] == "a.parquet:0.0"
    assert json.loads(line)["reason"] == "a conversation of other ids"
    known = read_manifest(str(tmp_path / "out"), CaptureManifest).imported
    assert known is not None
    assert known.counts["documents_skipped"] == 1


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("late", [0, 1])
def test_generated_answers_stand_where_the_test_of_the_shift_says(
    stop: bool, late: int, scored: Scored, smollm2_dir: Path, tmp_path: Path
) -> None:
    documents, starts, _ = scored
    write_axolotl(tmp_path / "set", scored, late=late, stop=stop)
    config = config_of(tmp_path / "set", tmp_path / "out", format="axolotl", tokenizer=str(smollm2_dir))
    import_dataset(config, Silent())
    verify(str(tmp_path / "out"))
    known = read_manifest(str(tmp_path / "out"), CaptureManifest).imported
    assert known is not None
    assert (known.moved, known.rest) == (-late, "exact")
    for sample, one, start in zip(Capture(str(tmp_path / "out")), documents, starts, strict=True):
        rows = len(sample.offsets) - 1
        for row in range(rows - late - (not stop)):
            shown, logprob, _ = sample.row(row)
            assert len(shown) > 0
            np.testing.assert_allclose(logprob, one.logprob[start - 1 + row][shown], atol=1 / 64 + 1e-4)
        if not stop or late:  # nothing was listed about the last token
            assert not len(sample.row(rows - 1)[0])
            assert sample.row(rows - 1)[2] == 0.0


def test_a_tokenizer_without_a_template_is_refused(scored: Scored, tmp_path: Path, tokenizer_file: Any) -> None:
    write_axolotl(tmp_path / "set", scored)
    config = config_of(tmp_path / "set", tmp_path / "out", format="axolotl", tokenizer=str(tokenizer_file("llama2")))
    with pytest.raises(XtokenError, match=r"conversations need a chat template, and .* has none; name"):
        import_dataset(config, Silent())
    assert not (tmp_path / "out").exists()
