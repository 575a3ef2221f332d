"""Captures of conversations: what lies in them is what the teacher gives for the whole rendering, at taught tokens."""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from in_process import InProcess
from talks import TALKS

from xtoken.pipeline.capture import conversations, precompute
from xtoken.pipeline.capture.estimate.dry_run import dry_run
from xtoken.pipeline.chats import from_json, open_chat_model, read_row, spans_of
from xtoken.pipeline.corpus import Corpus
from xtoken.pipeline.page.data import sample_data
from xtoken.pipeline.page.sample import load_sample
from xtoken.pipeline.share.card.stats import read_stats
from xtoken.pipeline.share.merge import merge
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.checks import CaptureCheck
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.figures import capture_figures
from xtoken.pipeline.store.inspect import inspect
from xtoken.pipeline.store.publish import committed
from xtoken.pipeline.store.reader import iter_capture, iter_parquet
from xtoken.pipeline.store.verify import verify
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs.artifacts import InspectConfig
from xtoken.schemas.configs.capture import CorpusConfig, PrecomputeConfig
from xtoken.schemas.configs.share import MergeConfig, PullConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, read_manifest
from xtoken.schemas.spans import row_of_token
from xtoken.schemas.tables import SPAN_COLUMNS
from xtoken.schemas.ui.progress import Silent

NAMES = ["plain", "system", "blanks", "empty", "thinking", "reasoning", "hostile"]
DAY = "2026-07-04"


class Told(Silent):
    """A Progress that remembers notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path: Path, smollm2_dir: Path) -> PrecomputeConfig:
    rows = [{"id": name, "messages": TALKS[name]} for name in NAMES]
    return PrecomputeConfig.from_flat(
        corpus=write(tmp_path / "chats.jsonl", rows),
        teacher=str(smollm2_dir),
        backend="fake",
        out=str(tmp_path / "out"),
        id_field="id",
        k=16,
        date=DAY,
        shard_bytes=50,
    )


def test_the_teacher_is_opened_once_for_conversations(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a tokenizer of a large vocabulary takes seconds."""
    loads: list[str] = []
    load = conversations.open_chat_model

    def counted(source: str, **options: Any) -> Any:
        loads.append(source)
        return load(source, **options)

    monkeypatch.setattr(conversations, "open_chat_model", counted)
    dry_run(config.changed(dry_run=True), Silent())
    assert len(loads) == 1
    precompute(config, Silent(), executor=InProcess())
    assert len(loads) == 3, "by the driver, and by the worker, which is here, too"


def capture(config: PrecomputeConfig) -> CaptureManifest:
    manifest = precompute(config, Silent(), executor=InProcess())
    assert manifest is not None
    return manifest


def samples(config: PrecomputeConfig) -> list[dict[str, Any]]:
    return [row for batch in iter_capture(config.out) for row in batch.to_pylist()]


def test_rows_are_those_of_a_forward_pass_of_the_whole_rendering(config: PrecomputeConfig, smollm2_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config.changed(backend="hf", audit="hf", dtype="float32", device="cpu")
    manifest = capture(config)
    assert manifest.audits[0].same_top1 == 1.0
    assert verify(config.out)["rows"] == sum(part.rows for part in manifest.parts)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    codec, seen = open_codec(manifest.codec), 0
    for batch in iter_capture(config.out):
        rows, row_T = codec.decode(batch), row_of_token(batch)
        start = 0
        for sample in batch.to_pylist():
            ids = sample["teacher_ids"]
            talk = [dict(message) for message in TALKS[sample["sample_id"].removesuffix("#0")]]
            if sample["sample_id"] in ("plain#0", "system#0"):  # the others have tokens across contents' ends
                whole = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
                assert ids == whole
            with torch.no_grad():
                logprob_TU = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
            for at, row in enumerate(row_T[start : start + len(ids)]):
                if row < 0:
                    continue
                seen += 1
                entries = slice(rows.offsets[row], rows.offsets[row + 1])
                wanted_U = logprob_TU[at - 1]
                assert rows.ids[entries.start] == wanted_U.argmax()
                np.testing.assert_allclose(rows.logprob[entries], wanted_U[rows.ids[entries]], atol=1 / 64 + 1e-3)
                first = row_T[start : start + len(ids)].max() + 1 - len(sample["realised_logprob"])
                assert sample["realised_logprob"][row - first] == pytest.approx(wanted_U[ids[at]], abs=1e-3)
            start += len(ids)
    assert seen == sum(part.rows for part in manifest.parts) > 80


def test_what_is_taught_is_the_answers_and_the_tokens_that_end_them(config: PrecomputeConfig) -> None:
    manifest = capture(config)
    assert manifest.schema_version == 6
    assert manifest.chat is not None
    assert (manifest.chat.form, manifest.chat.date, manifest.chat.stop_token) == ("messages", DAY, 2)
    assert not manifest.bos
    model = open_chat_model(config.teacher.teacher, date=datetime.fromisoformat(DAY))
    for sample in samples(config):
        name = sample["sample_id"].removesuffix("#0")
        spans = spans_of({name: sample[name] for name in SPAN_COLUMNS})
        taught = {
            span.message: sample["text"].encode()[span.byte_start : span.byte_end] for span in spans if span.learn
        }
        del taught
        conversation = from_json(sample["messages"])
        tokens = model.encode(conversation)
        assert sample["teacher_ids"] == tokens.ids.tolist()
        assert sample["teacher_end"] == tokens.ends.tolist()
        assert spans == tokens.spans
        assert len(sample["realised_logprob"]) == tokens.learn.sum()
        answers = [one["content"] for one in TALKS[name] if one["role"] == "assistant"]
        assert [message.content for message in conversation.messages if message.role == "assistant"] == answers


def test_two_runs_write_the_same_bytes_and_a_rerun_does_nothing(config: PrecomputeConfig, tmp_path: Path) -> None:
    first, other = capture(config), capture(config.changed(out=str(tmp_path / "other")))
    assert first.parts == other.parts
    assert (first.run_hash, first.plan_hash, first.files) == (other.run_hash, other.plan_hash, other.files)
    assert len(first.parts) > 2
    assert capture(config) == first


def test_a_teacher_without_a_template_is_refused_before_anything_is_read(
    config: PrecomputeConfig, gemma3_dir: Path
) -> None:
    with pytest.raises(XtokenError, match="has no chat template"):
        capture(config.changed(teacher=str(gemma3_dir)))
    assert not Path(config.out).exists()


ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TALKS["plain"][:2]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello, you."}]},
    "prompt": {"prompt": "Hi there", "completion": "Hello, you."},
    "alpaca": {"instruction": "Hi there", "input": "", "output": "Hello, you."},
}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
@pytest.mark.parametrize("form", ROWS)
def test_every_form_in_every_kind_of_file_is_the_same_conversation(tmp_path: Path, form: str, suffix: str) -> None:
    path = tmp_path / f"c.{suffix}"
    table = pa.Table.from_pylist([{**ROWS[form], "other": 1}])
    line = json.dumps({**ROWS[form], "other": 1}).encode() + b"\n"
    if suffix == "parquet":
        pq.write_table(table, path)
    elif suffix == "arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}
        path.write_bytes(pack[suffix](line))
    corpus = Corpus(CorpusConfig(corpus=str(path), form="auto"))
    (document,) = corpus.documents()
    assert corpus.form == form
    assert from_json(document.text) == read_row(ROWS["messages"], "messages")
    assert (document.text_bytes, len(document.text.encode())) == (19, 96)


def test_a_text_field_counts_first_and_the_run_says_so(config: PrecomputeConfig, tmp_path: Path) -> None:
    both = write(tmp_path / "both.jsonl", [{"text": "plain words", **ROWS["messages"]}])
    config = config.changed(corpus=both, id_field=None, date=None)
    told = Told()
    manifest = precompute(config, told, executor=InProcess())
    assert manifest is not None
    assert manifest.chat is None
    assert "form" not in manifest.corpus.options
    assert told.notes[0] == "the corpus is read as text; its columns could be read as messages, see --form"
    other = config.changed(form="messages", out=str(tmp_path / "chat"))
    told = Told()
    manifest = precompute(other, told, executor=InProcess())
    assert manifest is not None
    assert manifest.chat is not None
    assert told.notes == [
        "the corpus holds conversations, form messages; its columns could be read as text, see --form"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": "last"}, r"--turns last is for conversations, and the corpus holds text; .*--form"),
        ({"template_arg": ["a=1", "b=2"]}, r"--template-arg a=1,b=2 is for conversations"),
        ({"learn": ["thinking"]}, r"--learn thinking is for conversations"),
    ],
)
def test_settings_of_conversations_are_refused_for_text(
    config: PrecomputeConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "c.txt").write_text("words")
    with pytest.raises(XtokenError, match=message):
        capture(config.changed(corpus=str(tmp_path / "c.txt"), id_field=None, date=None, **changes))
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos": "always"}, r"--bos always is for text: of conversations the chat template"),
        ({"on_rendered": "text"}, r"--on-rendered text is for a corpus of text: the contents of messages are always"),
        ({"text": False}, r"--no-text is for a corpus of text: a student reads conversations .*; leave it out, and"),
        ({"text": False, "generate": 6}, r"--no-text is for a corpus of text"),
    ],
)
def test_settings_of_text_are_refused_for_conversations(
    config: PrecomputeConfig, changes: dict[str, Any], message: str
) -> None:
    for run in (capture, lambda asked: dry_run(asked.changed(dry_run=True), Silent())):
        if "generate" not in changes or run is capture:
            with pytest.raises(XtokenError, match=message):
                run(config.changed(**changes))
    assert not Path(config.out).exists()


def test_turns(config: PrecomputeConfig) -> None:
    def shown(turns: str) -> dict[str, list[int]]:
        changed = config.changed(turns=turns, out=f"{config.out}-{turns}")
        capture(changed)
        verify(changed.out)
        return {
            row["sample_id"]: [m for m, learn in zip(row["span_message"], row["span_learn"], strict=True) if learn]
            for row in samples(changed)
            if row["sample_id"].startswith(("plain", "system"))
        }

    assert shown("all") == {"plain#0": [1, 1, 3, 3], "system#0": [2, 2]}
    assert shown("last") == {"plain#0": [3, 3], "system#0": [2, 2]}
    assert shown("each") == {"plain#1": [1, 1], "plain#3": [3, 3], "system#2": [2, 2]}


def test_what_is_too_long_is_cut_to_an_answer_or_skipped_by_name(config: PrecomputeConfig) -> None:
    limit = 45
    manifest = capture(config.changed(max_tokens=limit))
    kept = samples(config)
    assert max(len(row["teacher_ids"]) for row in kept) <= limit
    assert [row["sample_id"] for row in kept if not row["complete"]] == ["plain#0", "reasoning#0"]
    plain = from_json(kept[0]["messages"])
    assert [message.content for message in plain.messages] == ["Hi there", "Hello, you."]
    lines = [json.loads(line) for line in (Path(config.out) / "skipped.jsonl").read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == ["thinking#0", "hostile#0"]
    assert capture_figures(manifest)["conversations_skipped"] == capture_figures(manifest)["conversations_cut"] == 2
    assert inspect(config.out)["skipped_conversations"] == {"longer than --max-tokens": 2}
    assert "skipped.jsonl" in (Path(config.out) / "SHA256SUMS").read_text()
    skipping = config.changed(max_tokens=limit, long="skip", out=f"{config.out}-skip")
    capture(skipping)
    assert {row["sample_id"] for row in samples(skipping)} == {"system#0", "blanks#0", "empty#0"}


def test_a_corpus_of_nothing_but_skips_is_a_finished_capture(config: PrecomputeConfig) -> None:
    manifest = capture(config.changed(max_tokens=8))
    assert sum(part.samples for part in manifest.parts) == 0
    assert sum(part.counts["conversations_skipped"] for part in manifest.parts) == len(NAMES)
    assert verify(config.out)["samples"] == 0


def test_a_refused_conversation_stops_the_run_by_name_or_is_skipped(config: PrecomputeConfig, tmp_path: Path) -> None:
    tail = [{"id": "silent", "messages": [{"role": "user", "content": "Hi"}]}]
    tail += [{"id": "calls", "messages": [*TALKS["call"][:2], TALKS["call"][2]]}]
    rows = [{"id": f"fine-{n}", **ROWS["messages"]} for n in range(3)] + tail
    config = config.changed(corpus=write(tmp_path / "more.jsonl", rows))
    with pytest.raises(XtokenError, match=r"conversation 'silent': nothing is taught: .*--on-bad skip"):
        capture(config)
    skipping = config.changed(on_bad="skip", template=None)
    manifest = capture(skipping)
    assert [row["sample_id"] for row in samples(config)][:3] == ["fine-0#0", "fine-1#0", "fine-2#0"]
    assert capture(skipping) == manifest
    assert "nothing is taught" in (Path(config.out) / "skipped.jsonl").read_text()


def test_a_run_that_a_conversation_stopped_goes_on_with_skip(config: PrecomputeConfig, tmp_path: Path) -> None:
    """What was committed before it stays."""
    rows = [{"id": f"fine-{n}", **ROWS["messages"]} for n in range(40)]
    rows[35] = {"id": "silent", "messages": [{"role": "user", "content": "Hi"}]}
    config = config.changed(corpus=write(tmp_path / "more.jsonl", rows), shard_bytes=30)
    with pytest.raises(XtokenError, match="conversation 'silent'"):
        capture(config)
    before = committed(config.out)
    assert len(before) > 5
    manifest = capture(config.changed(on_bad="skip"))
    assert {index: manifest.parts[index] for index in before} == before
    assert sum(part.samples for part in manifest.parts) == 39
    fresh = config.changed(on_bad="skip", out=str(tmp_path / "fresh"))
    assert [part.sha256 for part in capture(fresh).parts] == [part.sha256 for part in manifest.parts]
    with pytest.raises(XtokenError, match="on_bad: 'skip' there, 'stop' now"):
        capture(fresh.changed(on_bad="stop"))


DATED = (
    "{{ 'Today is ' + strftime_now('%Y') + (' quietly' if quiet else '') }}\n{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


def test_a_template_of_ones_own_its_variables_and_its_day(config: PrecomputeConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(DATED)
    config = config.changed(template=str(tmp_path / "mine.jinja"), template_arg=["quiet=true"], date="1999-12-31")
    manifest = capture(config)
    assert manifest.chat is not None
    assert manifest.chat.template == hashlib.sha256(DATED.encode()).hexdigest()
    assert (manifest.chat.date, manifest.chat.arguments) == ("1999-12-31", {"quiet": True})
    table = load_tokenizer(config.teacher.teacher).table
    first = samples(config)[0]
    said = b"".join(table.token(token) for token in first["teacher_ids"][: first["span_token_end"][0]])
    assert said.startswith(b"Today is 1999 quietly\n")
    # the day is the plan's, whenever the run goes on; another day or template is another run
    assert capture(config.changed(date=None)) == manifest
    with pytest.raises(XtokenError, match=r"holds another run .*date: '1999-12-31' there, '2000-01-01' now"):
        capture(config.changed(date="2000-01-01"))
    (tmp_path / "mine.jinja").write_text(DATED + " ")
    with pytest.raises(XtokenError, match=r"holds another run .*template_hash"):
        capture(config)
    (tmp_path / "mine.jinja").write_text(DATED)
    with pytest.raises(XtokenError, match=r"template_arg: \['quiet=true'\] there, \[\] now"):
        capture(config.changed(template_arg=[]))


@pytest.mark.parametrize("learn", [[], ["thinking"]])
def test_reasoning_is_taught_on_demand(
    config: PrecomputeConfig, tokenizer_file: Callable[[str], Path], learn: list[str]
) -> None:
    manifest = capture(config.changed(teacher=str(tokenizer_file("qwen3").parent), learn=learn))
    row = next(row for row in samples(config) if row["sample_id"] == "reasoning#0")
    taught = [kind for kind, one in zip(row["span_kind"], row["span_learn"], strict=True) if one]
    last = ["marker", "thinking", "marker"] if learn else []
    assert taught == ["assistant", "stop", *last, "assistant", "stop"], "Qwen3 drops the reasoning of earlier answers"
    assert manifest.chat is not None
    assert ("thinking" in manifest.chat.learn) == bool(learn)
    counts = sum((Counter(part.counts) for part in manifest.parts), Counter[str]())
    assert counts["absent_thinking"] == 2
    assert (counts["taught_thinking"] > 0) == bool(learn)


def test_an_intended_student_is_met_span_by_span(
    config: PrecomputeConfig, tokenizer_file: Callable[[str], Path]
) -> None:
    same = capture(config.changed(student=config.teacher.teacher))
    counts = sum((Counter(part.counts) for part in same.parts), Counter[str]())
    rows = sum(part.rows for part in same.parts)
    assert counts["chunks"] == counts["chunks_1_1"] + counts["student_snapped"] * 0 <= rows
    assert counts["student_lost"] == counts["student_refused"] == 0
    other = config.changed(student=str(tokenizer_file("qwen3").parent), out=f"{config.out}-qwen3")
    counts = sum((Counter(part.counts) for part in capture(other).parts), Counter[str]())
    assert 0 < counts["chunks_1_1"] <= counts["chunks"] <= rows
    with pytest.raises(XtokenError, match="--student bytes has no chat template; leave --student out"):
        capture(config.changed(student="bytes", out=f"{config.out}-bytes"))


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "kind": (lambda row: row["span_kind"].__setitem__(0, "banter"), "span_kind is unknown"),
    "length": (lambda row: row["span_part"].pop(), "span_part has another length"),
    "falls": (lambda row: row["span_token_end"].__setitem__(1, 0), "span_token_end decreases"),
    "short": (lambda row: row["span_token_end"].__setitem__(-1, len(row["teacher_ids"]) - 1), "is not the end"),
    "bytes": (lambda row: row["span_byte_end"].__setitem__(0, 1), "a span ends where none of its tokens does"),
    "taught": (lambda row: row["span_learn"].__setitem__(1, True), "a span is taught that nobody answers"),
    "message": (lambda row: row["span_message"].__setitem__(1, 9), "span_message is beyond the messages"),
    "template": (lambda row: row["span_message"].__setitem__(1, -1), "a template's span has a message, or another"),
    "part": (lambda row: row["span_part"].__setitem__(1, -1), "span_message or span_part is negative"),
    "json": (lambda row: row.__setitem__("messages", "[]"), "messages is not the JSON of a conversation"),
    "rows": (lambda row: row["span_learn"].__setitem__(3, False), "kept has another length"),
    "none": (lambda row: row.__setitem__("span_learn", [False] * len(row["span_kind"])), "nothing of it is taught"),
    "gone": (lambda row: row.update({name: [] for name in SPAN_COLUMNS}), "it has no spans"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_spans_that_do_not_fit_are_damage(config: PrecomputeConfig, damage: str) -> None:
    manifest = capture(config)
    check = CaptureCheck.of(manifest)
    (batch,) = [b for b in iter_parquet(f"{config.out}/data/part-00000.parquet") if b.num_rows]
    rows = batch.to_pylist()
    assert rows[0]["span_kind"][:2] == ["template", "user"]
    check.batch(pa.RecordBatch.from_pylist(rows, check.schema))
    DAMAGES[damage][0](rows[0])
    with pytest.raises(VerificationError, match=DAMAGES[damage][1]):
        check.batch(pa.RecordBatch.from_pylist(rows, check.schema))


def test_subsets_merges_cards_and_pages(config: PrecomputeConfig, tmp_path: Path) -> None:
    first = capture(config)
    rows = [{"id": "more", "messages": TALKS["plain"]}]
    second = config.changed(corpus=write(tmp_path / "more.jsonl", rows), out=str(tmp_path / "second"))
    capture(second)
    merge(MergeConfig(sources=[config.out, second.out], destination=str(tmp_path / "both")), Silent())
    both = read_manifest(str(tmp_path / "both"), CaptureManifest)
    assert (both.schema_version, both.chat) == (6, first.chat)
    assert verify(str(tmp_path / "both"))["samples"] == len(NAMES) + 1
    other = config.changed(turns="last", out=str(tmp_path / "last"), corpus=second.corpus.corpus)
    capture(other)
    with pytest.raises(XtokenError, match=r"chat.turns is 'all' and 'last'"):
        merge(MergeConfig(sources=[config.out, other.out], destination=str(tmp_path / "no")), Silent())
    pull(PullConfig(source=config.out, destination=str(tmp_path / "rows"), columns=["rows"]), Silent())
    assert verify(str(tmp_path / "rows"))["rows"] == sum(part.rows for part in first.parts)
    left = next(iter_capture(str(tmp_path / "rows")))
    assert left["messages"].null_count == left["text"].null_count == left.num_rows
    stats = read_stats(config.out, first, Silent())
    assert stats.rows == sum(part.rows for part in first.parts)
    taught = sum(
        end - start
        for row in samples(config)
        for start, end, learn in zip([0, *row["span_byte_end"]], row["span_byte_end"], row["span_learn"], strict=False)
        if learn
    )
    assert stats.text_bytes == taught
    row = inspect(config.out)["samples_shown"][0]["row"]
    assert row["in_text"] == "<eos>" or samples(config)[0]["text"].find(row["in_text"]) >= 0
    page = sample_data(load_sample(InspectConfig(path=config.out, html="plain#0")))
    assert sum(place >= 0 for place in page["row"]) == len(page["realised"]) == len(page["rows"])
    assert [chunk[4] is None for chunk in page["chunks"]] == [place < 0 for place in page["row"]]


def test_the_dry_run_counts_what_is_taught(config: PrecomputeConfig) -> None:
    found = dry_run(config.changed(dry_run=True, pilot=True), Silent())
    manifest = capture(config)
    tokens, rows = (sum(getattr(part, name) for part in manifest.parts) for name in ("tokens", "rows"))
    assert found["form"] == "messages"
    assert found["tokens"] == tokens
    assert found["taught_share"] == pytest.approx(rows / tokens, abs=1e-4)
    assert found["text_bytes"] == manifest.corpus.text_bytes
    done = dry_run(config.changed(dry_run=True), Silent())
    assert done["shards_left"] == 0
