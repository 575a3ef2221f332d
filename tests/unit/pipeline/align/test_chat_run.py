"""Whole runs of align over captures of conversations: what lies there after, what is refused, and that it is the same
again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import InProcess, InThisProcess
from talks import TALKS

from xtoken.pipeline.align.common_samples import compare
from xtoken.pipeline.align.run import align
from xtoken.pipeline.align.stage import chat_student
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.chats import from_json
from xtoken.pipeline.project.files import read_tables
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.columns import flat
from xtoken.pipeline.store.figures import target_figures
from xtoken.pipeline.store.reader import iter_capture, iter_targets
from xtoken.pipeline.store.skip_records import SKIPPED_FILE
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.share import PullConfig
from xtoken.schemas.errors import IncompleteRun, XtokenError
from xtoken.schemas.manifest import CaptureManifest, TargetManifest, read_manifest
from xtoken.schemas.tables import CHAT_TARGETS
from xtoken.schemas.ui.progress import Silent

LOSSES = ["p-kl", "h-kl", "gold", "uld", "strict", "alm", "byte-prefix"]
REFUSING = (
    "{% for m in messages %}[{{ m.content }}]{% if 'rain' in m.content %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)
Captured = Callable[[str], str]


def captured(root: Path, teacher: str, talks: dict[str, list[dict[str, Any]]] = TALKS, **more: Any) -> str:
    """A capture by the fake teacher of another model's tokens."""
    lines = [json.dumps({"id": name, "messages": messages}) for name, messages in talks.items()]
    (root / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = {"backend": "fake", "id_field": "id", "date": "2026-07-04", "learn": ["thinking"], "max_tokens": 512}
    places = {"corpus": str(root / "corpus.jsonl"), "teacher": teacher, "out": str(root / "c")}
    precompute(PrecomputeConfig.from_flat(**places, **{**given, **more}), Silent(), executor=InProcess())
    return str(root / "c")


@pytest.fixture(scope="module")
def sources(tokenizer_file: Callable[[str], Path]) -> Captured:
    return lambda name: str(tokenizer_file(name).parent)


@pytest.fixture(scope="module")
def capture(sources: Captured, tmp_path_factory: pytest.TempPathFactory) -> str:
    return captured(tmp_path_factory.mktemp("smollm2"), sources("smollm2"))


def aligned(capture: str, student: str, out: Path, **more: Any) -> TargetManifest:
    config = AlignConfig(captures=[capture], student=student, out=str(out), **{"losses": ["p-kl"], **more})
    return align(config, Silent(), executor=InThisProcess())


def test_a_run(capture: str, sources: Captured, tmp_path: Path) -> None:
    manifest = aligned(capture, sources("qwen3"), tmp_path / "t", losses=LOSSES)
    stored = read_manifest(capture, CaptureManifest)
    assert stored.chat is not None
    assert manifest.schema_version == CHAT_TARGETS
    config = AlignConfig(captures=[capture], student=sources("qwen3"), out="t")
    student = chat_student(config, stored)
    assert student is not None
    assert manifest.chat == student.info
    assert (manifest.chat.date, manifest.chat.learn) == (stored.chat.date, stored.chat.learn)
    verify(str(tmp_path / "t"))
    rows = {row["sample_id"]: row for batch in iter_targets(str(tmp_path / "t")) for row in batch.to_pylist()}
    theirs = {row["sample_id"]: row for batch in iter_capture(capture) for row in batch.to_pylist()}
    assert rows.keys() == theirs.keys()
    for name, row in rows.items():
        # what the student reads is what its template writes of the messages
        tokens = student.model.encode(from_json(theirs[name]["messages"]), stored.chat.learn)
        assert row["student_ids"] == tokens.ids.tolist()
        assert row["learn"] == tokens.learn.tolist()
        assert len(row["teacher_logprob"]) == len(row["chunk_student_end"])
    chunks = sum((~np.isnan(flat(batch, "teacher_logprob"))).sum() for batch in iter_targets(str(tmp_path / "t")))
    assert sum(part.rows for part in manifest.parts) == sum(part.counts["chunks"] for part in manifest.parts) == chunks
    # SmolLM2 leaves reasoning as text of the answer; Qwen3 drops that of earlier turns
    w = read_tables(str(tmp_path / "t"), manifest.files, manifest.student, manifest.teacher_tokenizer)
    stop = w.student_id == manifest.chat.stop_token
    assert w.teacher_id[stop].tolist() == [stored.chat.stop_token]
    figures = target_figures(manifest)["conversations"]
    assert 0.5 < figures["share_of_taught_bytes"] < 1
    assert figures["learn_tokens"] > figures["ce_only_tokens"] > 0
    lost = {name: count for name, count in figures.items() if name.startswith("lost")}
    assert lost == {"lost_assistant_absent": 1, "lost_marker_absent": 2, "lost_thinking_absent": 1}


@pytest.mark.parametrize("student", ["qwen3", "smollm2"])
def test_a_student_does_not_learn_to_end_where_the_teacher_was_cut(
    sources: Captured, tmp_path: Path, student: str
) -> None:
    """The student's template writes a stop behind every answer; of answers that the teacher wrote itself only those
    that it ended have one that is taught."""
    prompts = {str(at): [{"role": "user", "content": f"What is {at} + 2?"}] for at in range(8)}
    capture = captured(tmp_path, sources("smollm2"), prompts, generate=6, learn=[])
    ended = [row["complete"] for batch in iter_capture(capture) for row in batch.to_pylist()]
    assert 0 < sum(ended) < len(ended)
    manifest = aligned(capture, sources(student), tmp_path / "targets")
    assert manifest.chat is not None
    rows = [row for batch in iter_targets(str(tmp_path / "targets")) for row in batch.to_pylist()]
    learned = [
        any(taught and token == manifest.chat.stop_token for token, taught in zip(*pair, strict=True))
        for pair in ((row["student_ids"], row["learn"]) for row in rows)
    ]
    assert learned == ended
    assert all(any(row["learn"]) for row in rows)
    verify(str(tmp_path / "targets"))


@pytest.mark.thorough
def test_the_same_again_with_any_number_of_workers(sources: Captured, tmp_path: Path) -> None:
    many = {f"{name} {number}": talk for number in range(4) for name, talk in TALKS.items()}
    capture = captured(tmp_path, sources("smollm2"), many, shard_bytes=300)
    configs = [
        AlignConfig(captures=[capture], student=sources("qwen3"), out=str(tmp_path / out), workers=count)
        for out, count in (("one", 1), ("again", 1), ("two", 2))
    ]
    for config in configs:
        align(config, Silent())
    one, *others = (sorted((Path(config.out) / "data").iterdir()) for config in configs)
    assert len(one) > 1
    for other in others:
        assert [path.read_bytes() for path in other] == [path.read_bytes() for path in one]


def test_what_the_students_template_refuses_is_named(capture: str, sources: Captured, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(REFUSING)
    more = {"template": str(tmp_path / "t.jinja")}
    with pytest.raises(IncompleteRun, match=r"the chat template of .* cannot represent \d samples"):
        aligned(capture, sources("smollm2"), tmp_path / "t", **more)
    manifest = aligned(capture, sources("smollm2"), tmp_path / "t", on_bad="set-aside", **more)
    skipped = [json.loads(line) for line in (tmp_path / "t" / SKIPPED_FILE).read_text().splitlines()]
    assert len(skipped) == sum(part.counts["samples_skipped"] for part in manifest.parts)
    refused = [record for record in skipped if record["reason"] == "the chat template refuses it"]
    assert {record["document"] for record in refused} >= {"call", "calls"}
    verify(str(tmp_path / "t"))
    # another template is another run
    with pytest.raises(XtokenError, match="belongs to another align run"):
        aligned(capture, sources("smollm2"), tmp_path / "t", on_bad="set-aside")


def test_flags_that_mean_nothing_are_refused(
    capture: str, sources: Captured, tmp_path: Path, small_capture: Callable[..., Path]
) -> None:
    with pytest.raises(XtokenError, match=r"holds conversations.*leave --corpus out"):
        aligned(capture, sources("smollm2"), tmp_path / "t", corpus=str(tmp_path))
    texts = str(small_capture({"a.txt": "one two"}, "bytes"))
    with pytest.raises(XtokenError, match=r"holds texts.*leave --template-arg out"):
        aligned(texts, "bytes", tmp_path / "t", losses=["p-kl"], template_arg=["a=1"])
    with pytest.raises(XtokenError, match="bytes has no chat template"):
        aligned(capture, "bytes", tmp_path / "t", losses=["p-kl"])
    silent = str(tmp_path / "silent")
    pull(PullConfig(source=capture, destination=silent, columns=["rows"]), Silent())
    with pytest.raises(XtokenError, match=r"silent is a copy without text.*; align the whole capture"):
        aligned(silent, sources("smollm2"), tmp_path / "t")
    with pytest.raises(ValueError, match="names no variable"):
        AlignConfig(captures=["c"], student="s", out="o", template_arg=["thinking"])


def test_several_teachers_of_the_same_conversations(
    capture: str, sources: Captured, tmp_path: Path, small_capture: Callable[..., Path]
) -> None:
    """Qwen3's template strips what an answer begins with; the student's tokens follow from the messages alone."""
    said = [{"role": "user", "content": "What else?"}, {"role": "assistant", "content": "Nothing."}]
    other = captured(tmp_path, sources("qwen3"), TALKS | {"plain": said})
    manifests = {root: read_manifest(root, CaptureManifest) for root in (capture, other)}
    found = compare(manifests, "1GB", Silent())
    assert (found["in_all"], found["other_bytes"]) == (len(TALKS) - 1, 1)
    assert found["examples"]["other_bytes"] == [next(name for name in ids(capture) if name.startswith("plain"))]
    tokens = []
    for root in (capture, other):
        aligned(root, sources("smollm2"), tmp_path / f"t{len(tokens)}")
        batches = iter_targets(str(tmp_path / f"t{len(tokens)}"))
        tokens.append({row["sample_id"]: row["student_ids"] for batch in batches for row in batch.to_pylist()})
    assert {name for name in tokens[0] if tokens[0][name] != tokens[1].get(name)} == {*found["examples"]["other_bytes"]}
    texts = str(small_capture({"a.txt": "one two"}, "bytes"))
    with pytest.raises(XtokenError, match=r"holds conversations, .* texts; align them one by one"):
        compare({capture: manifests[capture], texts: read_manifest(texts, CaptureManifest)}, "1GB", Silent())
    chat = manifests[other].chat
    assert chat is not None
    later = manifests[other].model_copy(update={"chat": chat.model_copy(update={"date": "2026-07-05"})})
    with pytest.raises(XtokenError, match="differ in --date"):
        compare({capture: manifests[capture], other: later}, "1GB", Silent())


def ids(capture: str) -> list[str]:
    return [name for batch in iter_capture(capture, ["sample_id"]) for name in batch["sample_id"].to_pylist()]
