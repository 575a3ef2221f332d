"""Which files of a folder are documents: of the split that is asked for, and none that only lie beside the data."""

import json
from pathlib import Path

import fsspec
import pytest

from xtoken.pipeline.corpus import Corpus
from xtoken.pipeline.corpus.splits import split_of
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.flags import build

CLONE = {  # as "git clone" of a hub's dataset leaves it, and a few things that tools put there
    "README.md": "---\nlicense: mit\n---\n# Boats",
    "LICENSE": "MIT",
    "LICENSE-APACHE.txt": "Apache",
    "CITATION.cff": "cff-version: 1.2.0",
    "dataset_infos.json": "{}",
    "boats.py": "class Boats: ...",
    "images/boat.png": "PNG",
    ".gitattributes": "*.parquet filter=lfs",
    ".git/config": "[core]",
    "_builder.lock": "",
    "data.lock": "",
    "cache-0123456789abcdef.arrow": "no stream",
    "data/train-00000-of-00002.jsonl": "train 0",
    "data/train-00001-of-00002.jsonl": "train 1",
    "data/validation-00000-of-00001.jsonl": "validation",
    "data/test-00000-of-00001.jsonl": "test",
}


def fill(root: str, files: dict[str, str]) -> str:
    fs, path = fsspec.core.url_to_fs(root)
    for name, text in files.items():
        fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe(f"{path}/{name}", (json.dumps({"text": text}) if name.endswith(".jsonl") else text).encode())
    return root


def config(root: object, split: str | None = None) -> CorpusConfig:
    return build(CorpusConfig, {"corpus": str(root), **({} if split is None else {"split": split})})


def texts(root: object, split: str | None = None) -> list[str]:
    return [document.text for document in Corpus(config(root, split)).documents()]


@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_clone_of_a_dataset(tmp_path: Path, where: str) -> None:
    root = fill(str(tmp_path) if where == "disk" else f"memory://{tmp_path.name}", CLONE)
    assert texts(root) == ["train 0", "train 1"]
    assert texts(root, "test") == ["test"]
    assert texts(root, "dev,train") == ["train 0", "train 1", "validation"]
    assert texts(root, "all") == ["test", "train 0", "train 1", "validation"]
    listing = Corpus(config(root)).listing
    assert listing.read == {".jsonl of split train": 2}
    beside = ["*.lock", "*.py", "CITATION.cff", "LICENSE", "LICENSE-APACHE.txt", "README.md", "cache-*.arrow"]
    beside += ["dataset_infos.json", "pictures", "split test", "split validation"]
    assert listing.left_out == dict.fromkeys(beside, 1) | {"hidden": 3}
    assert listing.label("plan").startswith("plan (.jsonl of split train (2); left out: *.lock, *.py, CITATION.cff")
    assert Corpus(config(f"{root}/README.md")).listing.label("plan") == "plan"


def test_what_is_named_itself_is_read(tmp_path: Path) -> None:
    fill(str(tmp_path), CLONE)
    assert texts(tmp_path / "data" / "test-00000-of-00001.jsonl") == ["test"]
    assert texts(tmp_path / "README.md")[0].startswith("---")
    (tmp_path / "test" / "en").mkdir(parents=True)
    (tmp_path / "test" / "en" / "a.jsonl").write_text('{"text": "below a folder called test"}')
    assert texts(tmp_path / "test") == ["below a folder called test"]


def test_a_folder_of_another_split_says_what_it_holds(tmp_path: Path) -> None:
    fill(str(tmp_path), {"test.jsonl": "x", "README.md": "card"})
    with pytest.raises(XtokenError, match=r"no file that can be read.*left out: README\.md, split test; --split all"):
        Corpus(config(tmp_path))


def test_the_only_split(tmp_path: Path) -> None:
    fill(str(tmp_path), {"test/a.jsonl": "a", "README.md": "card"})
    assert texts(tmp_path, "only") == ["a"]
    fill(str(tmp_path), {"b.jsonl": "b"})
    with pytest.raises(XtokenError, match=r"holds the splits test, train, and one is needed; name its file or folder"):
        Corpus(config(tmp_path, "only"))


def test_pages_and_titles_are_documents(tmp_path: Path) -> None:
    fill(str(tmp_path / "docs"), {"README.md": "index", "dev/README.md": "for developers", "test.md": "on tests"})
    assert texts(tmp_path / "docs") == ["index", "for developers", "on tests"]
    fill(str(tmp_path / "essays"), {"a driving test.txt": "an essay", "README.md": "about these essays"})
    assert texts(tmp_path / "essays") == ["an essay"]
    fill(str(tmp_path / "reviews"), {"train/pos/0_9.txt": "good", "test/pos/0_9.txt": "no", "test/neg/1_1.txt": "no"})
    assert texts(tmp_path / "reviews") == ["good"]
    assert Corpus(config(tmp_path / "reviews", "test")).listing.read == {".txt of split test": 2}


def test_a_link_to_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    fill(str(tmp_path / "here"), {"a.jsonl": "a"})
    fill(str(tmp_path / "there"), {"b.jsonl": "b"})
    (tmp_path / "here" / "b.jsonl").symlink_to(tmp_path / "there" / "b.jsonl")
    assert texts(tmp_path / "here") == ["a", "b"]
    (tmp_path / "here" / "more").symlink_to(tmp_path / "there", target_is_directory=True)
    with pytest.raises(XtokenError, match="here/more is a link to a folder, which is not followed"):
        Corpus(config(tmp_path / "here"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("boats-test.arrow", "test"),
        ("wiki.valid.jsonl", "validation"),
        ("en/dev.jsonl", "validation"),
        ("val2.jsonl", "validation"),
        ("Test.jsonl", "test"),
        ("test_sft-00000-of-00001.parquet", "test"),
        ("test/training.jsonl", "test"),
        ("evaluation/x.parquet", "test"),
        ("latest.jsonl", None),
        ("contest-trains.jsonl", None),
        ("part-00000-of-00010.parquet", None),
        ("attestation/value.jsonl", None),
    ],
)
def test_words_in_names(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize("split", ["held-out", "train_sft", "", ","])
def test_unknown_splits(split: str) -> None:
    with pytest.raises(XtokenError, match=r"--split: .* is none of train, validation, test, all, only"):
        config("x", split)
