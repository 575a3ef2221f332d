"""The plan cuts the corpus the same way each time, and its slices notice a corpus that changes."""

import hashlib
import json

import pytest

from xtoken.pipeline.capture.plan import PLAN_FILE, SliceReader, check_files, load_plan, make_plan, settle_plan
from xtoken.pipeline.corpus import Corpus
from xtoken.pipeline.store.files import Folder, StopRun
from xtoken.schemas.configs.capture import CorpusConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.ui.progress import Silent

TEXTS = [f"document {number} " + "word " * (number * 7 % 40) for number in range(60)]


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for name, part in (("a.jsonl", TEXTS[:25]), ("b.jsonl", TEXTS[25:40]), ("d.jsonl", TEXTS[41:])):
        (root / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    (root / "c.txt").write_text(TEXTS[40])
    return root


def config_of(corpus, **options) -> CorpusConfig:
    return CorpusConfig(corpus=str(corpus), **options)


def plan_of(corpus, shard_bytes=700, **options):
    return make_plan(config_of(corpus, **options), shard_bytes, Silent())


def test_shards_tile_the_corpus_and_close_at_the_size(corpus):
    plan = plan_of(corpus)
    documents = list(Corpus(config_of(corpus)).documents())
    assert len(documents) == 60
    assert len(plan.shards) > 5
    done = 0
    for index, shard in enumerate(plan.shards):
        mine = documents[done : done + shard.documents]
        sizes = [len(document.text.encode()) for document in mine]
        assert shard.index == index
        assert (shard.file, shard.record) == (mine[0].file, mine[0].record)
        assert shard.text_bytes == sum(sizes)
        assert sum(sizes[:-1]) < 700
        assert sum(sizes) >= 700 or index == len(plan.shards) - 1
        done += shard.documents
    assert done == plan.corpus.documents == 60
    assert plan.corpus.text_bytes == sum(len(document.text.encode()) for document in documents)


def test_hash_of_a_shard_is_over_ids_and_texts(corpus):
    plan = plan_of(corpus, shard_bytes=1)
    first = next(Corpus(config_of(corpus)).documents())
    sha256 = hashlib.sha256()
    for part in (first.id.encode(), first.text.encode()):
        sha256.update(len(part).to_bytes(8, "little") + part)
    assert plan.shards[0].sha256 == sha256.hexdigest()


def test_same_corpus_same_plan_wherever_it_lies(corpus, tmp_path):
    plan = plan_of(corpus)
    moved = corpus.rename(tmp_path / "moved")
    assert plan_of(moved).hash == plan.hash
    assert plan_of(moved, shard_bytes=300).hash != plan.hash
    assert plan_of(moved, limit=59).hash != plan.hash
    text = (moved / "c.txt").read_text()
    (moved / "c.txt").write_text(text[:-2] + "x ")
    assert plan_of(moved).hash != plan.hash


@pytest.mark.parametrize("step", [1, 2, 3, -1])
def test_slices_are_the_shards_in_any_order(corpus, step):
    plan = plan_of(corpus)
    reader = SliceReader(config_of(corpus), plan)
    found = {shard.index: [document.text for document in reader.read(shard)] for shard in plan.shards[::step]}
    if abs(step) == 1:
        assert [text for index in sorted(found) for text in found[index]] == [text.strip("\n") for text in TEXTS]
    for index, texts in found.items():
        assert len(texts) == plan.shards[index].documents


def test_going_on_in_a_file_reads_each_record_once(corpus, monkeypatch):
    plan = plan_of(corpus)
    opened = []
    real = Corpus.documents
    monkeypatch.setattr(Corpus, "documents", lambda self, *start: opened.append(start) or real(self, *start))
    reader = SliceReader(config_of(corpus), plan)
    for shard in plan.shards:
        reader.read(shard)
    assert opened == [(0, 0)]


def test_a_limit_is_applied_once(corpus):
    plan = plan_of(corpus, limit=30)
    reader = SliceReader(config_of(corpus, limit=30), plan)
    assert sum(len(reader.read(shard)) for shard in reversed(plan.shards)) == 30


def test_a_corpus_that_changes_or_vanishes_stops_the_run_and_is_named(corpus):
    plan = plan_of(corpus)
    reader = SliceReader(config_of(corpus), plan)
    whole = (corpus / "b.jsonl").read_text()
    shard = next(shard for shard in plan.shards if shard.file == 1)
    (corpus / "b.jsonl").write_text(whole.replace("document 3", "dokument 3"))
    with pytest.raises(StopRun, match=r"'b\.jsonl'.*holds other documents than when it was planned"):
        reader.read(shard)
    (corpus / "b.jsonl").unlink()
    with pytest.raises(StopRun, match=r"b\.jsonl"):
        reader.read(shard)
    with pytest.raises(StopRun, match="added or removed"):
        SliceReader(config_of(corpus), plan)
    (corpus / "b.jsonl").write_text(whole)
    assert len(SliceReader(config_of(corpus), plan).read(shard)) == shard.documents


def test_settled_once_then_compared(corpus, tmp_path):
    folder = Folder(str(tmp_path / "out"))
    folder.make("")
    plan = settle_plan(folder, config_of(corpus), 700, Silent())
    assert load_plan(folder) == plan
    written = folder.read(PLAN_FILE)
    assert settle_plan(folder, config_of(corpus), 700, Silent()) == plan
    assert folder.read(PLAN_FILE) == written
    with pytest.raises(XtokenError, match="shard_bytes: 700 there, 701 now"):
        settle_plan(folder, config_of(corpus), 701, Silent())
    with pytest.raises(XtokenError, match="limit: None there, 5 now"):
        settle_plan(folder, config_of(corpus, limit=5), 700, Silent())
    check_files(folder.root, plan, config_of(corpus))
    (corpus / "b.jsonl").write_text("")
    with pytest.raises(XtokenError, match=r"file 'b\.jsonl'.*was added, removed or changed"):
        check_files(folder.root, plan, config_of(corpus))
    for text in (b"", b"{", b"[]", b'""', b"{}", b"[" * 100_000):
        folder.replace(PLAN_FILE, text)
        with pytest.raises(VerificationError, match=r"plan\.json is damaged.*remove it and run the same precompute"):
            load_plan(folder)


def test_a_plan_of_other_rules_keeps_its_files(corpus, tmp_path):
    """A release before splits read cards and tests as documents: its captures go on with them."""
    whole = plan_of(corpus, split=["all"])
    assert whole.corpus.options["split"] == ["all"]
    (corpus / "b.jsonl").rename(corpus / "b-test.jsonl")
    files = [(name.replace("b.", "b-test."), size) for name, size in whole.files]
    options = {name: value for name, value in whole.corpus.options.items() if name != "split"}
    old = whole.model_copy(update={"files": files, "corpus": whole.corpus.model_copy(update={"options": options})})
    assert check_files("out", old, config_of(corpus)).left_out == {}
    assert SliceReader(config_of(corpus), old).read(old.shards[0])
    new = plan_of(corpus)
    assert "b-test.jsonl" not in new.names
    assert "split" not in new.corpus.options
    assert check_files("out", new, config_of(corpus)).left_out == {"split test": 1}
    with pytest.raises(XtokenError, match=r"'b-test\.jsonl'.*was added"):
        check_files("out", new, config_of(corpus, split=["all"]))


def test_a_plan_of_another_split_is_another_run(corpus, tmp_path):
    folder = Folder(str(tmp_path / "out"))
    folder.make("")
    settle_plan(folder, config_of(corpus), 700, Silent())
    with pytest.raises(XtokenError, match=r"split: \['train'\] there, \['all'\] now"):
        settle_plan(folder, config_of(corpus, split=["all"]), 700, Silent())


def test_nothing_usable(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(XtokenError, match=r"no usable document .*; check --text-field and the path"):
        plan_of(tmp_path, on_bad="skip")
    (tmp_path / "a.jsonl").write_text("")
    for form, said in (("messages", "conversation"), ("alpaca", "conversation"), ("ids", "row of token ids")):
        with pytest.raises(XtokenError, match=rf"has no usable {said} \(bad: {{}}\); check --form {form} and the path"):
            plan_of(tmp_path, form=form)
