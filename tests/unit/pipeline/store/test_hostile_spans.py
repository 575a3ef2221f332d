"""Captures of conversations from strangers: spans that contradict each other are refused in words by every reader."""

import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz.mutations import write

from xtoken.pipeline.page.sample_page import write_page
from xtoken.pipeline.query import query
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import InspectConfig, QueryConfig
from xtoken.schemas.errors import VerificationError, XtokenError

from .damage import CHANGES, damaged


@pytest.mark.parametrize("column", CHANGES)
def test_a_span_that_does_not_fit_is_named(chat_capture: Path, tmp_path: Path, column: str) -> None:
    first = pq.read_table(next(iter(sorted((chat_capture / "data").glob("*.parquet")))))["sample_id"][0].as_py()
    for root in damaged(chat_capture, column, tmp_path):
        with pytest.raises(VerificationError, match=f"(?s)part 0: sample '{first}'"):
            verify(str(root))
        with pytest.raises(VerificationError, match=f"sample '{first}'"):
            inspect(str(root))
        with pytest.raises(VerificationError, match=f"sample '{first}'"):
            write_page(InspectConfig(path=str(root), html=first, out=str(tmp_path / "page.html")))
        with suppress(VerificationError):  # or the worst one is another sample
            write_page(InspectConfig(path=str(root), html="worst", out=str(tmp_path / "page.html")))


@pytest.mark.parametrize("column", CHANGES)
def test_a_query_of_such_a_capture_ends_in_rows_or_in_words(chat_capture: Path, tmp_path: Path, column: str) -> None:
    counts = (f"(SELECT count(*) FROM (SELECT DISTINCT * FROM {view}))" for view in ("spans", "tokens", "samples"))
    asked = f"SELECT {', '.join(counts)}"
    for root in damaged(chat_capture, column, tmp_path):
        with suppress(XtokenError):
            query(QueryConfig(path=str(root), sql=asked))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"messages": 3}', '{"messages": []}', "[" * 5000, "\0"])
def test_messages_that_are_no_conversation(chat_capture: Path, tmp_path: Path, text: str) -> None:
    root = Path(shutil.copytree(chat_capture, tmp_path / "capture"))
    path = next(iter(sorted((root / "data").glob("*.parquet"))))
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["messages"] = text
    write(path, pa.Table.from_pylist(rows, table.schema))
    with pytest.raises(VerificationError, match=f"sample '{rows[0]['sample_id']}'.*messages"):
        verify(str(root))
