"""The page as a file: what it says, what it refuses, and that a sample's text stays text."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from xtoken import cli
from xtoken.pipeline.html.frame import document, json_text, short
from xtoken.pipeline.page.sample import Sample, load_sample
from xtoken.pipeline.page.sample_page import EDGES, figures, file_name, sample_page, write_page
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import data_name
from xtoken.schemas.configs.artifacts import InspectConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.ui.markup import escaped

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "captures"
Load = Callable[..., Sample]


class Parts(HTMLParser):
    """Elements by name, and what script and style hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "style"):
            self.inside.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open][-1] += data


def source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_policy_allows_this_script_and_style_only(sample_of: Load) -> None:
    found = Parts(sample_page(sample_of("attack.txt:0#0")))
    policy = next(attrs["content"] for tag, attrs in found.tags if "http-equiv" in attrs)
    data, script = found.inside["script"]
    assert policy == (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"script-src {source(script)}; style-src {source(found.inside['style'][0])}"
    )
    assert json.loads(data)["bytes"] > 0
    assert not [attrs for _, attrs in found.tags if "style" in attrs or any(name.startswith("on") for name in attrs)]


@pytest.mark.parametrize("name", ["attack.txt:0#0", "unseen.txt:0#0", "scripts.txt:0#0", "code.txt:0#0"])
def test_every_sample_has_the_elements_of_any_other(sample_of: Load, name: str) -> None:
    page = sample_page(sample_of(name))
    assert [tag for tag, _ in Parts(page).tags] == [
        tag for tag, _ in Parts(sample_page(sample_of("plain.txt:0#0"))).tags
    ]
    assert "onerror" not in re.sub(r'<script type="application/json".*?</script>', "", page)
    assert not set(page) & set("\u200b\u202e\u2066\ufeff\x00\x1b\u2028")


def test_nothing_outside_the_page_is_needed(sample_of: Load) -> None:
    page = sample_page(sample_of("plain.txt:0#0"))
    found = Parts(page)
    assert not [attrs for tag, attrs in found.tags if "src" in attrs or (tag == "link" and attrs["href"] != "data:,")]
    assert not [
        word for word in ("https:", "url(", "@import") if word in page.replace("http://www.w3.org/2000/svg", "")
    ]
    assert "prefers-color-scheme:dark" in page
    sheet = found.inside["style"][0]
    assert all(f".h{step}{{" in sheet and f"--h{step}:" in sheet for step in range(len(EDGES) + 1))


def test_names_are_escaped() -> None:
    page = document(
        "</title><script>x</script>", escaped("<b>\u202e"), "", script="1", data={"</script>": "\u2028<!--"}
    )
    assert [tag for tag, _ in Parts(page).tags].count("script") == 2
    assert escaped("<b>é") == "<bdi>&lt;b&gt;é</bdi>"
    assert json_text(["</script>", "\u202e"]) == r'["\u003c/script\u003e","\u202e"]'
    assert short("/models/llama3/tokenizer.json") == "llama3"


def test_the_head_counts(sample_of: Load) -> None:
    sample = sample_of("plain.txt:0#0")
    assert sample.targets is not None
    row = sample.targets.row
    ends = list(zip([0, *row["chunk_student_end"]], [0, *row["chunk_teacher_end"]], strict=True))
    pairs = sum(b[0] - a[0] == b[1] - a[1] == 1 for a, b in pairwise(ends))
    size = len(sample.row["text"].encode())
    bits = -math.fsum(sample.row["realised_logprob"]) / math.log(2)
    assert figures(sample) == {
        "sample_id": "plain.txt:0#0",
        "teacher": sample.manifest.teacher.model,
        "student": "bytes",
        "bytes": size,
        "teacher_tokens": len(sample.row["teacher_ids"]),
        "student_tokens": len(row["student_ids"]),
        "chunks": len(row["chunk_student_end"]),
        "one_to_one": round(pairs / len(row["chunk_student_end"]), 4),
        "bits_per_byte": round(bits / size, 4),
    }
    assert 0 < pairs < len(ends)
    assert f"<b>{bits / size:.3f}</b>" in sample_page(sample)


@pytest.mark.parametrize(
    ("path", "capture"),
    [
        ("v1-topk", None),
        ("v2-sampled", None),
        ("v3-tau", None),
        ("v2-targets", "v1-topk"),
        ("v3-targets", "v3-topk"),
        ("v3-targets-sampled", "v3-sampled"),
    ],
)
def test_what_every_release_wrote_can_be_drawn(path: str, capture: str | None) -> None:
    given = None if capture is None else str(GOLDEN / capture)
    sample = load_sample(InspectConfig(path=str(GOLDEN / path), html="worst", capture=given))
    data = json.loads(Parts(sample_page(sample)).inside["script"][0])
    assert len(data["rows"]) == len(data["realised"]) > 0
    assert ("draws" in data) == ("sampled" in path)


def test_a_subset_without_rows_is_drawn_without(capture: str, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli.app, ["share", "pull", capture, str(tmp_path / "some"), "--columns", "space_logprob"])
    assert run.exit_code == 0, run.output
    sample = load_sample(InspectConfig(path=str(tmp_path / "some"), html="plain.txt:0#0"))
    page = sample_page(sample)
    assert json.loads(Parts(page).inside["script"][0])["rows"] is None
    assert "The rows were left out" in page
    assert "put together from the tokens" in page


def test_the_command_writes_a_page(capture: str, targets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(cli.app, ["inspect", targets, "--html", "worst", "--capture", capture, "--json"])
    shown = json.loads(run.output)
    assert run.exit_code == 0
    assert (tmp_path / shown["page"]).stat().st_size == shown["page_bytes"]
    again = write_page(InspectConfig(path=capture, html=shown["sample_id"], out=str(tmp_path / "new" / "page.html")))
    assert again["page"] == f"{tmp_path}/new/page.html"
    with pytest.raises(XtokenError, match="is a folder; name the page in it"):
        write_page(InspectConfig(path=capture, html="worst", out=str(tmp_path / "new")))


def test_file_names() -> None:
    assert file_name("code/heap q.py#0") == "code-heap-q.py-0.html"
    assert file_name("../..") == "sample.html"
    assert len(file_name("x" * 500)) == 85


def test_what_does_not_belong_together_is_refused(capture: str, targets: str) -> None:
    with pytest.raises(XtokenError, match="have neither text nor teacher rows; say --capture"):
        load_sample(InspectConfig(path=targets, html="worst"))
    with pytest.raises(XtokenError, match="is a capture itself; leave --capture out"):
        load_sample(InspectConfig(path=capture, html="worst", capture=capture))
    with pytest.raises(XtokenError, match=r"was aligned from \w{12}; give that capture"):
        load_sample(InspectConfig(path=targets, html="worst", capture=str(GOLDEN / "v3-topk")))
    with pytest.raises(XtokenError, match=r"near it: .*'plain.txt:0#0'"):
        load_sample(InspectConfig(path=targets, html="plain.txt", capture=capture))


@pytest.mark.parametrize(
    ("column", "change", "says"),
    [
        ("pkl_codes", lambda codes: [10**6, *codes[1:]], "pkl_codes has a code outside"),
        ("hkl_common_codes", lambda codes: [-1, *codes[1:]], "hkl_common_codes has a code outside"),
        ("chunk_teacher_end", lambda ends: [*ends[:-1], 10**6], "chunk_teacher_end is not a way through"),
        ("prefix_count", lambda counts: [counts[0] + 1, *counts[1:]], "prefix_count does not sum to the entries"),
        ("uld_count", lambda counts: counts[:-1], "uld_count has .* values, chunk says"),
    ],
)
def test_damaged_targets_are_refused(
    capture: str, damaged: Path, column: str, change: Callable[[list[int]], list[int]], says: str
) -> None:
    url = Folder(str(damaged)).url(data_name(0))
    table = pq.read_table(url)
    field, values = table.schema.field(column), table[column].to_pylist()
    name = table["sample_id"][0].as_py()
    at = table.schema.get_field_index(column)
    broken = pa.array([change(values[0]), *values[1:]], field.type)
    pq.write_table(table.set_column(at, field, broken), url)
    with pytest.raises(VerificationError, match=says):
        load_sample(InspectConfig(path=str(damaged), html=name, capture=capture))
