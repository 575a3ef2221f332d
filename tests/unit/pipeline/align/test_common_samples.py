"""What several captures have in common, counted in SQL and compared with Python's own sets."""

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess

from xtoken.pipeline.align.common_samples import CLASSES, compare, refuse_nothing_in_common
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.store.reader import iter_capture
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.ui.progress import Silent

TEXTS = {f"d{number}": f"document {number}: größer als {number * 7} 東京\n" * 3 for number in range(9)}


def make(folder: Path, texts: dict[str, str], **more: Any) -> str:
    """A capture by the fake teacher of bytes, in a folder of its own."""
    folder.mkdir()
    lines = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    fields = {"teacher": "bytes", "backend": "fake", "k": 4, "shard_bytes": 200, **more}
    corpus, out = str(folder / "corpus.jsonl"), str(folder / "c")
    config = PrecomputeConfig.from_flat(corpus=corpus, id_field="id", out=out, **fields)
    precompute(config, Silent(), executor=InProcess())
    return out


def manifests(*roots: str) -> dict[str, CaptureManifest]:
    return {root: read_manifest(root, CaptureManifest) for root in roots}


def by_sets(*roots: str, texts: bool = True) -> dict[str, int]:
    """The same counts without SQL."""
    held: list[dict[str, Any]] = []
    for root in roots:
        rows = [row for batch in iter_capture(root) for row in batch.to_pylist()]
        held.append({r["sample_id"]: (r["teacher_end"][-1], r["complete"], r["text"] if texts else 0) for r in rows})
    counts = dict.fromkeys((*CLASSES, "alike"), 0)
    for name in set().union(*held):
        found = [samples[name] for samples in held if name in samples]
        kind = "other_bytes" if len(set(found)) > 1 else "in_one" if len(found) == 1 else "in_some"
        counts["in_all" if kind == "in_some" and len(found) == len(roots) else kind] += 1
        counts["alike"] += max(map(found.count, found)) > 1
    return counts


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """All documents; all but one, one of them changed at its last character; and three, two of them changed."""
    root = tmp_path_factory.mktemp("joined")
    changed = {**TEXTS, "d4": TEXTS["d4"][:-1] + "!"}
    few = {name: TEXTS[name] for name in ("d0", "d4")} | {"d1": TEXTS["d1"] + "more"}
    return [
        make(root / "a", TEXTS),
        make(root / "b", {name: text for name, text in changed.items() if name != "d8"}),
        make(root / "c", few),
    ]


@pytest.mark.thorough
def test_two_captures(three: list[str]) -> None:
    a, b, _ = three
    found = compare(manifests(a, b), "1GB", Silent())
    assert {name: found[name] for name in (*CLASSES, "alike")} == by_sets(a, b)
    assert (found["in_all"], found["in_one"], found["other_bytes"]) == (7, 1, 1)
    assert found["examples"] == {"in_one": ["d8#0"], "other_bytes": ["d4#0"]}
    assert found["compared_by"] == "text"
    assert [found["captures"][root]["in_one"] for root in (a, b)] == [1, 0]
    assert all("parts_unread" not in counts for counts in found["captures"].values())


def test_three_captures(three: list[str]) -> None:
    found = compare(manifests(*three), "1GB", Silent())
    assert {name: found[name] for name in (*CLASSES, "alike")} == by_sets(*three)
    assert (found["in_all"], found["in_some"], found["other_bytes"]) == (1, 5, 2)
    assert [found["captures"][root]["in_some"] for root in three] == [5, 5, 0]
    assert found["captures"][three[2]]["alike"] == 3, "d0 in all, d1 with neither, d4 as in the first"


def test_windows_of_other_sizes_have_other_bytes(three: list[str], tmp_path: Path) -> None:
    short = make(tmp_path / "short", TEXTS, max_tokens=40)
    found = compare(manifests(three[0], short), "1GB", Silent())
    assert {name: found[name] for name in (*CLASSES, "alike")} == by_sets(three[0], short)
    assert (found["in_all"], found["other_bytes"]) == (0, len(TEXTS))
    said = r"(?s)9 ids stand for other bytes.*--max-tokens 512, plan \w{12}, 9 samples.*--max-tokens 40, plan "
    with pytest.raises(XtokenError, match=said + r".*--teacher A --teacher B"):
        refuse_nothing_in_common(manifests(three[0], short), found)


def test_without_text_lengths_are_compared(three: list[str], tmp_path: Path) -> None:
    textless = make(tmp_path / "textless", {**TEXTS, "d4": TEXTS["d4"][:-1] + "!"}, text=False)
    found = compare(manifests(three[0], textless), "1GB", Silent())
    assert found["compared_by"] == "length"
    assert {name: found[name] for name in (*CLASSES, "alike")} == by_sets(three[0], textless, texts=False)
    assert found["in_all"] == len(TEXTS)


def test_a_part_that_cannot_be_read_is_named_and_refuses_nothing(three: list[str], tmp_path: Path) -> None:
    other = make(tmp_path / "other", TEXTS)
    (Path(other) / "data" / "part-00001.parquet").unlink()
    found = compare(manifests(three[0], other), "1GB", Silent())
    assert found["captures"][other]["parts_unread"] == [1]
    assert 0 < found["in_one"] < len(TEXTS)
    refuse_nothing_in_common(manifests(three[0], other), {**found, "alike": 0})


def test_too_little_memory_is_named(three: list[str]) -> None:
    with pytest.raises(XtokenError, match=r"do not fit --memory-limit 1KB; give more"):
        compare(manifests(*three), "1KB", Silent())
