"""The snippets of a generated card, run as a stranger would: in the dataset's folder, with DuckDB, pandas, polars and
``datasets``, on rows of a real model. What they decode is compared with our own decoder, sample by sample.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pytest

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.share.card.card import write_card
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.reader import iter_capture, load_vocab
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.share import CardConfig
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.engine
DOCUMENTS = {
    "a.txt": "The whale is a fish that spouts, with a horizontal tail. So said Ishmael in 1851, and 3 others.",
    "b.txt": "def area(r):\n    return 3.14159 * r ** 2\n",
    "c.txt": "Größe, naïve café — 東京タワー",
}
V1 = Path(__file__).parents[1] / "golden" / "captures" / "v1-topk"
_BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module", params=["topk", "sampled", "v1"])
def capture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture with its card: SmolLM2's rows, draws, and one of schema version 1."""
    root: Path = tmp_path_factory.mktemp("readers")
    if request.param == "v1":
        shutil.copytree(V1, root / "capture")
    else:
        (root / "text").mkdir()
        for name, text in DOCUMENTS.items():
            (root / "text" / name).write_text(text, encoding="utf-8")
        teacher, backend = str(request.getfixturevalue("smollm2_dir")), "hf" if request.param == "topk" else "fake"
        fixed = {"corpus": str(root / "text"), "teacher": teacher, "out": str(root / "capture"), "max_tokens": 32}
        precompute(PrecomputeConfig.from_flat(**fixed, codec=request.param, backend=backend), Silent())
    flags = ["corpus=cc0-1.0", "outputs=apache-2.0"]
    write_card(CardConfig(capture=str(root / "capture"), license=flags), Silent())
    return root / "capture"


@pytest.fixture
def blocks(capture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[str]]:
    """The card's code by language; the working folder is the dataset's."""
    monkeypatch.chdir(capture)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))  # it mixes folders of one name
    found: dict[str, list[str]] = {}
    for language, code in _BLOCK.findall((capture / "README.md").read_text(encoding="utf-8")):
        found.setdefault(language, []).append(code)
    return found


def _decoded(capture: Path, name: str) -> list[tuple[int, int, bytes, float]]:
    """(position, id, bytes, log-probability) of each of a sample's entries, by our own decoder."""
    codec, table = read_manifest(str(capture), CaptureManifest).codec, load_vocab(str(capture))
    for batch in iter_capture(str(capture)):
        for at in range(batch.num_rows):
            one = batch.slice(at, 1)
            if name == one["sample_id"][0].as_py():
                rows, first = open_codec(codec).decode(one), one["first_row"][0].as_py()
                row = np.repeat(np.arange(len(rows.offsets) - 1), np.diff(rows.offsets))
                entries = zip(row.tolist(), rows.ids.tolist(), rows.logprob.tolist(), strict=True)
                return [(first + r, token, table.token(token), logprob) for r, token, logprob in entries]
    raise AssertionError(name)


def test_duckdb(capture: Path, blocks: dict[str, list[str]]) -> None:
    first, second = blocks["sql"]
    surprising = duckdb.connect().sql(first).fetchall()
    samples = [sample for batch in iter_capture(str(capture)) for sample in batch.to_pylist()]
    bits = {s["sample_id"]: -sum(s["realised_logprob"]) / np.log(2) / s["teacher_end"][-1] for s in samples}
    assert len(surprising) == min(10, len(samples))
    assert dict(surprising) == pytest.approx({name: bits[name] for name, _ in surprising})
    assert len(duckdb.connect().sql(second).fetchall()) == 20
    table = duckdb.connect().sql(second.replace("LIMIT 20", ""))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.fetchall()]
    ours = _decoded(capture, min(bits))
    said = "logprob" if "logprob" in table.columns else "probability"
    theirs = [(row["position"], row["token_id"], bytes(row["bytes"])) for row in rows]
    order = sorted if said == "probability" else list  # equal counts stand in another order
    assert order(theirs) == order(entry[:3] for entry in ours)
    value = {entry[:2]: entry[3] if said == "logprob" else np.exp(entry[3]) for entry in ours}
    assert [row[said] for row in rows] == pytest.approx([value[one[:2]] for one in theirs])


def test_pandas_and_numpy(capture: Path, blocks: dict[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    reading, decoding = [code for code in blocks["python"] if "pl." not in code and "datasets" not in code]
    names: dict[str, Any] = {}
    exec(reading, names)  # the card's own code
    exec(decoding, names)
    ours = _decoded(capture, names["sample"]["sample_id"])
    found = names["best"] if "best" in names else names["guess"]
    assert list(zip(found["position"], found["token_id"], found["bytes"], strict=True)) == [one[:3] for one in ours]
    if "best" in names:
        assert found["logprob"].tolist() == pytest.approx([one[3] for one in ours])
        kept = np.bincount(names["row"], np.exp(names["logprob"]))
        assert kept + names["rest"] == pytest.approx(1.0, abs=0.02)
    else:
        assert found["probability"].tolist() == pytest.approx(np.exp([one[3] for one in ours]))
    text = b"".join(names["pieces"])
    assert text == bytes(names["sample"]["text"], "utf-8")
    assert str(text[:80]) in capsys.readouterr().out


def test_polars(capture: Path, blocks: dict[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(next(code for code in blocks["python"] if "pl." in code), names)
    samples = [sample for batch in iter_capture(str(capture)) for sample in batch.to_pylist()]
    table = names["samples"].collect()
    assert table["sample_id"].to_list() == [sample["sample_id"] for sample in samples]
    assert table["tokens"].to_list() == [len(sample["teacher_ids"]) for sample in samples]
    bits = [-sum(s["realised_logprob"]) / np.log(2) / s["teacher_end"][-1] for s in samples]
    assert table["bits_per_byte"].to_list() == pytest.approx(bits, rel=1e-4)
    assert "bits_per_byte" in capsys.readouterr().out


def test_datasets(capture: Path, blocks: dict[str, list[str]]) -> None:
    names: dict[str, Any] = {}
    exec(next(code for code in blocks["python"] if "datasets" in code), names)
    manifest = read_manifest(str(capture), CaptureManifest)
    assert len(names["samples"]) == sum(part.samples for part in manifest.parts)
    assert len(names["vocab"]) == manifest.tokenizer.size
    ours = next(iter_capture(str(capture), ["sample_id", "teacher_ids"]))
    assert names["samples"][0]["teacher_ids"] == ours["teacher_ids"][0].as_py()


def test_sha256sum(capture: Path, blocks: dict[str, list[str]]) -> None:
    check = next(code for code in blocks["bash"] if "sha256sum" in code)
    done = subprocess.run(["bash", "-c", check], cwd=capture, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "README.md: OK" in done.stdout
