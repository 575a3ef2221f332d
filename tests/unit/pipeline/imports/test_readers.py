"""Readers of DistillKit's and axolotl's files, on files that their code wrote."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.unit.pipeline.imports.sets import IMPORT, golden, numbers, words_tokenizer
from xtoken.pipeline.imports.axolotl import open_reader as open_axolotl
from xtoken.pipeline.imports.axolotl import parallel_lists, token_objects
from xtoken.pipeline.imports.distillkit import open_reader
from xtoken.pipeline.imports.distillkit_reader import DistillKitReader
from xtoken.pipeline.imports.documents import Spelling
from xtoken.pipeline.imports.parquet_rows import BadRow
from xtoken.pipeline.imports.rows import clean, packed, places
from xtoken.pipeline.imports.samples import ImportedSample, LeftOut, Reader
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.codecs import TopK
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.errors import XtokenError


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in which any id of a golden spells a text."""
    return words_tokenizer(tmp_path_factory.mktemp("words"))


def config_of(name: str, words: Path, tmp_path: Path, **more: Any) -> ImportConfig:
    """How a golden file is imported; its compression lies where the golden says."""
    said = golden(name)[0]
    if "config" in said:
        path = tmp_path / "compression.json"
        path.write_text((IMPORT / f"{name}.json").read_text())
        more["compression"] = str(path)
    kind = "axolotl" if name.startswith("ax_") else "distillkit"
    given: dict[str, Any] = {"format": kind, "tokenizer": str(words), "out": str(tmp_path / "out"), **more}
    return ImportConfig(paths=[str(IMPORT / f"{name}.parquet")], **given)


def reader_of(name: str, words: Path, tmp_path: Path, **more: Any) -> Reader:
    config = config_of(name, words, tmp_path, **more)
    opened = open_axolotl if config.format == "axolotl" else open_reader
    form = "ids" if config.format == "axolotl" else "text"
    return opened(config, Spelling(load_tokenizer(str(words))), form)


def samples(reader: Reader) -> list[ImportedSample]:
    found = [one for wanted in reader.slices() for one in reader.read(wanted)]
    assert not [one for one in found if isinstance(one, LeftOut)], found
    return [one for one in found if isinstance(one, ImportedSample)]


def entries(sample: ImportedSample, row: int) -> tuple[list[int], np.ndarray]:
    here = slice(int(sample.offsets[row]), int(sample.offsets[row + 1]))
    return sample.entry_ids[here].tolist(), sample.entry_logprob[here]


@pytest.mark.parametrize("entries_kept", ["head", "all"])
@pytest.mark.parametrize("name", ["dk_qwen3_1k", "dk_k8_1k", "oi_default_1k", "legacy_logprob_1k"])
def test_a_row_is_about_the_token_behind_it(name: str, entries_kept: str, words: Path, tmp_path: Path) -> None:
    said, _ = golden(name)
    found = samples(reader_of(name, words, tmp_path, entries=entries_kept))
    most = said["config"]["exact_k"] if entries_kept == "head" else said["config"]["k"]
    for sample, wanted in zip(found, said["samples"], strict=True):
        ids, value = np.array(wanted["ids"]), numbers(wanted["value" if "value" in wanted else "logprob"])
        padded = wanted["input_ids"][-1] == 999
        # the sampler's pad stands for the end of the document
        assert sample.ids.tolist() == [*wanted["input_ids"][:-1], 1256 if padded else wanted["input_ids"][-1]]
        assert (sample.first_row, sample.complete) == (1, padded)
        assert len(sample.offsets) == len(wanted["input_ids"])
        for row in range(len(ids)):
            shown, logprob = entries(sample, row)
            assert shown == ids[row, :most].tolist()
            np.testing.assert_allclose(logprob, value[row, :most], atol=1e-5, rtol=1e-6)


def test_documents_of_packed_rows_are_told_apart(words: Path, tmp_path: Path) -> None:
    """What the packing lost, the last token of each and with it what its last row is about, is not made up."""
    said, rows = golden("packed_1k")
    found = samples(reader_of("packed_1k", words, tmp_path))
    wanted = [(row, one) for row, sample in enumerate(said["samples"]) for one in sample["documents"]]
    assert len(found) == len(wanted)
    for sample, (row, document) in zip(found, wanted, strict=True):
        start, stop = document["start"], document["end"]
        assert sample.name.startswith(f"packed_1k.parquet:{row}.")
        assert sample.ids.tolist() == rows[row]["input_ids"][start:stop]
        assert not sample.complete
        assert len(sample.offsets) == stop - start
        for at in range(stop - start - 1):
            assert entries(sample, at)[0] == said["samples"][row]["ids"][start + at][:4]


def test_without_a_mask_packed_rows_are_refused(words: Path, tmp_path: Path) -> None:
    table = pq.read_table(IMPORT / "packed_1k.parquet").drop_columns(["attention_mask"])
    ids = [[*row[:3], 1256, *row[4:]] for row in table["input_ids"].to_pylist()]
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(table.set_column(0, "input_ids", [ids]), folder / "a.parquet")
    config = config_of("packed_1k", words, tmp_path).changed(paths=[str(folder)])
    spelling = Spelling(load_tokenizer(str(words)))
    with pytest.raises(BadRow, match=r"a.parquet:0: several documents without a mask.*--documents bos or"):
        samples(open_reader(config, spelling, "text"))
    split = samples(open_reader(config.changed(documents="eos"), spelling, "text"))
    assert [len(one.ids) for one in split[:2]] == [4, len(ids[0]) - 4]
    parted = open_reader(config.changed(documents="eos"), spelling, "text")
    samples(parted)
    # the token was put into the middle of documents, whose rows go on
    assert parted.borders == [len(ids), 0]
    assert "Behind 0 of 4 borders" in parted.findings[0]
    with pytest.raises(XtokenError, match=r"--documents bos: .* has no such token"):
        samples(open_reader(config.changed(documents="bos"), spelling, "text"))


@pytest.mark.parametrize("name", ["dirty_1k", "dirty_delta_1k"])
def test_what_a_row_must_not_be_believed_is_rest(name: str, words: Path, tmp_path: Path) -> None:
    said, _ = golden(name)
    valid = np.arange(1257) < said["tokenizer_size"]
    (sample,) = samples(reader_of(name, words, tmp_path, entries="all"))
    found = clean(sample, valid)
    (wanted,) = said["samples"]
    value = numbers(wanted["logprob"])
    for row, usable in enumerate(said["usable"]):
        ids = found.ids[found.row == row].tolist()
        kept = [at for at in usable if np.isfinite(value[row, at])]
        assert sorted(ids) == sorted({wanted["ids"][row][at] for at in kept}), said["row_notes"][row]
    rows, _ = packed(found, TopK(k=8, min_p=0.0), 1 / 32, rest_known=True)
    assert (rows.kept > 0).all()
    assert found.counts["entries_not_finite"] > 0


def test_logits_are_told_by_their_sums(words: Path, tmp_path: Path) -> None:
    reader = reader_of("topk_raw_1k", words, tmp_path)
    assert reader.source.rest == "unknown"
    said, _ = golden("topk_raw_1k")
    for sample, wanted in zip(samples(reader), said["samples"], strict=True):
        np.testing.assert_allclose(
            entries(sample, 0)[1], numbers(wanted["renormalised_logprob"])[0], atol=1e-5, rtol=1e-6
        )


def test_generated_answers_of_either_form_have_the_same_rows() -> None:
    objects, rows = golden("ax_token_id")
    _, others = golden("ax_lists")
    for wanted, row, other in zip(objects["samples"], rows, others, strict=True):
        one = token_objects(row[objects["field"]], "x")
        two = parallel_lists(other["logprobs"], other["target_token_ids"], "x")
        for found in (one, two):
            assert found.offsets.tolist() == [8 * at for at in range(len(wanted["answer_ids"]) + 1)]
            assert [sorted(found.ids[at : at + 8]) for at in found.offsets[:-1]] == [
                sorted(ids) for ids in wanted["ids"]
            ]
        at = one.taken(np.array([-1, 1, 99, 0]))
        assert np.diff(at.offsets).tolist() == [0, 8, 0, 8]
        assert at.ids[:8].tolist() == one.ids[8:16].tolist()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x", "no list of log-probabilities"),
        ([[{"token": "the", "logprob": -1.0}]], "tokens must be written as token_id:N"),
        ([[{"token": "token_id:7"}]], "without token id or log-probability"),
        ([["token_id:7"]], "without token id or log-probability"),
        ([{"a": 1}], "without a list of candidates"),
    ],
)
def test_answers_that_are_none(value: object, said: str) -> None:
    with pytest.raises(BadRow, match=said):
        token_objects(value, "x")


def test_rows_that_are_null_or_empty_and_what_is_no_log_probability() -> None:
    found = token_objects([None, [], [{"token": "token_id:7", "logprob": -9999.0}]], "x")
    assert found.offsets.tolist() == [0, 0, 0, 1]
    assert found.logprob.tolist() == [-np.inf]


@pytest.mark.parametrize("name", ["ax_prepared_vllm", "ax_prepared_sglang"])
def test_prepared_rows_are_found_where_either_server_puts_them(name: str, words: Path, tmp_path: Path) -> None:
    said, _ = golden(name)
    reader = reader_of(name, words, tmp_path)
    assert (reader.source.rest, reader.shift) == ("unknown", 0)
    if said["shift"] != 1:
        moved = reader.moved(said["shift"] - 1)
        assert moved is not None
        reader = moved
    (sample,) = samples(reader)
    truth = said["samples"][0]["truth"]
    assert sample.ids.tolist() == said["samples"][0]["input_ids"]
    at = places(sample)
    assert len(at) == sum(label != -100 for label in said["samples"][0]["labels"])
    for row, token in enumerate(at.tolist()):
        ids, _ = entries(sample, row)
        # vLLM's rows have the token of the text in the place of the last rank where it is not among them
        assert len(set(truth["ids"][token - 1]) & set(ids)) >= len(ids) - 1, "row j of the server is about token j + 1"
    hits, of = (int(one) for one in said["hits"][str(said["shift"])].split("/"))
    assert sum(int(sample.ids[token] in entries(sample, row)[0]) for row, token in enumerate(at.tolist())) == hits
    assert len(at) == of


@pytest.mark.parametrize(
    ("name", "said"),
    [("ax_lists", "is no DistillKit set: its columns are"), ("ax_prepared_vllm", "say 'xtoken import axolotl'")],
)
def test_files_of_another_format(name: str, said: str, words: Path, tmp_path: Path) -> None:
    config = config_of(name, words, tmp_path).changed(format="distillkit")
    with pytest.raises(XtokenError, match=said):
        open_reader(config, Spelling(load_tokenizer(str(words))), "text")


def test_rows_of_another_width_than_the_settings_say(words: Path, tmp_path: Path) -> None:
    config = config_of("dk_qwen3_1k", words, tmp_path).changed(paths=[str(IMPORT / "dk_recommended_1k.parquet")])
    reader = open_reader(config, Spelling(load_tokenizer(str(words))), "text")
    with pytest.raises(BadRow, match=r"have 56 bytes, and by --compression each has 140; give the configuration"):
        samples(reader)


def test_nobody_says_how_rows_are_compressed(words: Path, tmp_path: Path) -> None:
    config = config_of("dk_qwen3_1k", words, tmp_path).model_copy(update={"compression": None})
    with pytest.raises(XtokenError, match=r"compression_config.yaml does not exist.*with --compression FILE"):
        open_reader(config, Spelling(load_tokenizer(str(words))), "text")


def test_a_head_of_none_keeps_nothing(words: Path, tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match=r"exact_k is 0.*say --entries all"):
        reader_of("dk_noexact_1k", words, tmp_path)


@pytest.mark.parametrize(
    ("name", "refused"),
    [("dk_recommended_1k", True), ("dk_recommended_152k", True), ("dk_qwen3_1k", False), ("dk_normt_1k", False)],
)
def test_a_tail_that_leaps_from_the_head_is_noise(name: str, refused: bool, words: Path, tmp_path: Path) -> None:
    """The toolkit's recommended polynomial is fitted in float32, and is far from its rows."""
    reader = reader_of(name, words, tmp_path, entries="all")
    assert isinstance(reader, DistillKitReader)
    for wanted in reader.slices():
        assert list(reader.read(wanted))
    if refused:
        with pytest.raises(XtokenError, match=r"it is 0\.\d\d nats \(at most \.3\)\. Take --entries head"):
            reader.refuse_unsound(0.0, False)
    else:
        reader.refuse_unsound(0.0, False)
        with pytest.raises(XtokenError, match=r"2.0% of the rows add up to more than 1\.01"):
            reader.refuse_unsound(0.02, False)
