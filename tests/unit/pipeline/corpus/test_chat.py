"""Chat data, in every shape that hubs have it, is called by its name."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.pipeline.corpus import Corpus
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import XtokenError

OPENAI = [{"role": "user", "content": "How many boats?"}, {"role": "assistant", "content": "Seventeen."}]
SHAREGPT = [{"from": "human", "value": "How many boats?"}, {"from": "gpt", "value": "Seventeen."}]
RECORDS: list[dict[str, Any]] = [
    {"messages": OPENAI},
    {"conversations": SHAREGPT, "id": "1"},
    {"prompt": OPENAI[:1], "completion": OPENAI[1:]},
    {"prompt": "How many boats?", "completion": "Seventeen."},
    {"instruction": "Count.", "input": "boats", "output": "17"},
    {"chosen": OPENAI, "rejected": SHAREGPT},
]
FORMATS = ("jsonl", "parquet", "arrow", "saved")


def write(folder: Path, form: str, *records: dict[str, Any]) -> Path:
    path = folder / f"c.{form}"
    table = pa.Table.from_pylist(list(records))
    if form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif form == "parquet":
        pq.write_table(table, path)
    elif form == "arrow":
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        path.write_bytes(sink.getvalue())
    else:
        from datasets import Dataset

        path = folder / "saved"
        Dataset.from_list(list(records)).save_to_disk(path)
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(XtokenError) as error:
        list(Corpus(CorpusConfig(corpus=str(path), **options)).documents())
    return str(error.value)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "+".join(record))
@pytest.mark.parametrize("form", FORMATS)
def test_records_without_the_text_field(tmp_path: Path, form: str, record: dict[str, Any]) -> None:
    said = refusal(write(tmp_path, form, record))
    assert "chat data: has no field 'text'" in said
    assert f": a conversation, by the name {next(iter(record))}" in said
    assert "say which with --form" in said


@pytest.mark.parametrize("field", ["messages", "conversations", "prompt"])
@pytest.mark.parametrize("form", FORMATS)
def test_fields_that_hold_messages(tmp_path: Path, form: str, field: str) -> None:
    record = next(record for record in RECORDS if field in record)
    said = refusal(write(tmp_path, form, record), text_field=field)
    assert f"chat data: field {field!r} holds a conversation" in said
    assert "say which with --form" in said


def test_skipping_counts_them(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", RECORDS[0])
    path.write_text(path.read_text() + '{"text": "no chat", "messages": 3}\n')
    corpus = Corpus(CorpusConfig(corpus=str(path), on_bad="skip"))
    assert [document.text for document in corpus.documents()] == ["no chat"]
    assert corpus.bad == {"chat data": 1}


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, [{"name": "x", "size": 2}], [[1]], []])
def test_other_values_are_just_no_text(tmp_path: Path, value: Any) -> None:
    assert "field is not text" in refusal(write(tmp_path, "jsonl", {"text": value}))


@pytest.mark.parametrize("form", FORMATS)
def test_tables_add_no_arguments_and_no_fields_to_calls_and_tools(tmp_path: Path, form: str) -> None:
    """Arrow gives every object of a column the fields of all others, null where it has none."""

    def record(name: str, argument: str) -> dict[str, Any]:
        function = {"name": name, "parameters": {"type": "object", "properties": {argument: {"type": "string"}}}}
        call = {"type": "function", "function": {"name": name, "arguments": {argument: "x"}}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"messages": [OPENAI[0], said], "tools": [{"type": "function", "function": function}]}

    records = [record("weather", "city"), record("clock", "zone")]
    found = Corpus(CorpusConfig(corpus=str(write(tmp_path, form, *records)), form="messages")).documents()
    texts = [document.text for document in found]
    assert "null" not in "".join(texts)
    talks = [json.loads(text) for text in texts]
    assert [talk["tools"] for talk in talks] == [one["tools"] for one in records]
    arguments = [talk["messages"][1]["tool_calls"][0]["function"]["arguments"] for talk in talks]
    assert arguments == ['{"city":"x"}', '{"zone":"x"}']
