"""merge: what belongs together becomes one capture that stands every check; what does not is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from xtoken.pipeline.align import align
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.share.destination import Destination
from xtoken.pipeline.share.merge import merge
from xtoken.pipeline.share.push_pull import pull
from xtoken.pipeline.store.publish import data_name
from xtoken.pipeline.store.reader import iter_capture, load_vocab
from xtoken.pipeline.store.seal import seal
from xtoken.pipeline.store.verify import verify
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.share import MergeConfig, PullConfig
from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.schemas.manifest import CaptureManifest, content_hash, read_manifest
from xtoken.schemas.ui.progress import Silent

pytestmark = pytest.mark.usefixtures("one_worker_is_here")

TEXTS = {"one": "Un café, s'il vous plaît; puis deux. " * 20, "two": "def f(x):\n    return x + 1  # größer\n" * 25}


@pytest.fixture(scope="session")
def others(small_capture: Callable[..., Path]) -> dict[str, Path]:
    """Captures of other documents with the teacher and settings of ``kept_capture``, but its student."""
    settings: dict[str, Any] = {"shard_bytes": 1000, "k": 16, "min_p": 0.01, "student": "bytes"}
    return {name: small_capture({f"{name}.txt": text}, **settings) for name, text in TEXTS.items()}


def merged(sources: list[Any], destination: Path) -> CaptureManifest:
    merge(MergeConfig(sources=[str(source) for source in sources], destination=str(destination)), Silent())
    verify(str(destination))
    return read_manifest(str(destination), CaptureManifest)


def pulled(source: Path, destination: Path, **options: Any) -> Path:
    pull(PullConfig(source=str(source), destination=str(destination), **options), Silent())
    return destination


def rows(*roots: Path) -> list[dict[str, Any]]:
    return [row for root in roots for row in pa.Table.from_batches(iter_capture(str(root))).to_pylist()]


def edited(root: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    seal(str(root))
    return root


def test_parts_of_one_plan_become_the_whole_again(kept_capture, tmp_path):
    first = pulled(kept_capture, tmp_path / "first", parts="0-1")
    last = pulled(kept_capture, tmp_path / "last", parts="1-2")
    source, found = read_manifest(str(kept_capture), CaptureManifest), merged([last, first], tmp_path / "joined")
    assert found.parts == source.parts
    assert content_hash(found) == content_hash(source)
    assert (found.plan_hash, found.corpus) == (source.plan_hash, source.corpus)
    manifests = [read_manifest(str(root), CaptureManifest) for root in (last, first)]
    assert [origin.content_hash for origin in found.derived_from] == [content_hash(one) for one in manifests]
    assert (tmp_path / "joined" / "plan.json").read_bytes() == (kept_capture / "plan.json").read_bytes()
    assert rows(tmp_path / "joined") == rows(kept_capture)


def test_other_samples_of_one_part_are_refused(kept_capture, tmp_path):
    some = pulled(kept_capture, tmp_path / "some", where="complete")
    with pytest.raises(XtokenError, match=r"part \d of .*/some has sha256 .*; merge whole parts only"):
        merged([some, kept_capture], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_parts_without_some_samples_take_the_plan_away(kept_capture, tmp_path):
    first = pulled(kept_capture, tmp_path / "first", parts="0", where="true")
    merged([pulled(kept_capture, tmp_path / "last", parts="1-2"), first], tmp_path / "joined")
    assert not (tmp_path / "joined" / "plan.json").exists()


def test_shards_set_aside_are_filled_by_those_who_have_them(capture, tmp_path):
    whole = pulled(capture, tmp_path / "whole")
    for name in (data_name(1), "commits/part-00001.json"):
        (capture / name).unlink()

    def fail(manifest: dict[str, Any]) -> None:
        manifest["parts"].pop(1)
        manifest["set_aside"] = {"1": "the engine died"}

    broken = edited(capture, fail)
    assert merged([broken, pulled(whole, tmp_path / "mid", parts="1")], tmp_path / "joined").set_aside == {}
    last = pulled(whole, tmp_path / "last", parts="2")
    assert merged([broken, last], tmp_path / "still").set_aside == {1: "the engine died"}


def test_other_documents_are_joined_in_order(kept_capture, others, tmp_path):
    sources = [kept_capture, others["one"], others["two"]]
    manifests = [read_manifest(str(root), CaptureManifest) for root in sources]
    found = merged(sources, tmp_path / "joined")
    assert [part.index for part in found.parts] == list(range(sum(len(one.parts) for one in manifests)))
    assert rows(tmp_path / "joined") == rows(*sources)
    assert [origin.first_part for origin in found.derived_from] == [
        0,
        len(manifests[0].parts),
        len(manifests[0].parts) + len(manifests[1].parts),
    ]
    assert found.corpus.documents == 5
    assert found.corpus.text_bytes == sum(one.corpus.text_bytes for one in manifests)
    assert all(one.corpus.source in found.corpus.source for one in manifests)
    assert found.run_hash not in {one.run_hash for one in manifests}
    assert not (tmp_path / "joined" / "plan.json").exists()
    # the vocabulary is the first one's, so its parts are copied and the others recoded
    assert len({one.files["vocab.parquet"] for one in manifests}) == 3
    assert (tmp_path / "joined" / data_name(0)).read_bytes() == (kept_capture / data_name(0)).read_bytes()
    assert load_vocab(str(tmp_path / "joined")).info == manifests[0].tokenizer
    first, last = (merged([*order], tmp_path / name).run_hash for order, name in ((sources, "a"), (sources[::-1], "b")))
    assert first != last


def test_a_joined_capture_aligns(kept_capture, others, tmp_path):
    merged([kept_capture, others["one"]], tmp_path / "joined")
    config = AlignConfig(
        captures=[str(tmp_path / "joined")], student="bytes", out=str(tmp_path / "targets"), losses=["p-kl", "alm"]
    )
    targets = align(config, Silent())
    assert sum(part.samples for part in targets.parts) == len(rows(kept_capture, others["one"]))
    verify(str(tmp_path / "targets"))
    with pytest.raises(XtokenError, match=r"holds no plan\.json"):
        align(config.model_copy(update={"out": str(tmp_path / "t"), "corpus": str(tmp_path)}), Silent())


def test_a_sample_in_two_captures_is_named(kept_capture, others, tmp_path):
    one = pulled(others["one"], tmp_path / "one")
    shared = rows(one)[0]["sample_id"]
    edited(one, lambda manifest: manifest.update(run_hash="e" * 64))
    with pytest.raises(XtokenError, match=r"--id-field") as caught:
        merged([kept_capture, others["one"], one], tmp_path / "joined")
    assert f"{others['one']} and {one} both hold sample {shared!r}" in str(caught.value)
    assert not (tmp_path / "joined").exists()


def set_teacher(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["teacher"].update(fields)


DIFFERENT: dict[str, Callable[[dict[str, Any]], None]] = {
    "max_tokens is 64 and 65": lambda manifest: manifest.update(max_tokens=65),
    "bos is False and True": lambda manifest: manifest.update(bos=True),
    r"codec\.min_p is 0\.01 and 0\.02": lambda manifest: manifest["codec"].update(min_p=0.02),
    r"tokenizer\.hash is ": lambda manifest: manifest["tokenizer"].update(hash="0" * 64),
    r"teacher\.dtype is ": set_teacher(dtype="float8"),
    r"teacher\.weights_hash is ": set_teacher(weights_hash="0" * 64),
    r"teacher\.backend is 'fake' and 'hf'": set_teacher(backend="hf"),
    r"teacher\.model is ": set_teacher(model="another", weights_hash=None),
}


@pytest.mark.parametrize("rule", DIFFERENT)
def test_what_differs_is_named_with_both_values(kept_capture, others, tmp_path, rule):
    one = edited(pulled(others["one"], tmp_path / "one"), DIFFERENT[rule])
    with pytest.raises(XtokenError, match=rule) as caught:
        merged([kept_capture, one], tmp_path / "joined")
    assert str(kept_capture) in str(caught.value)
    assert str(one) in str(caught.value)
    assert not (tmp_path / "joined").exists()


def test_columns_and_text_must_be_the_same(kept_capture, others, tmp_path, tokenizer_file):
    less = pulled(others["one"], tmp_path / "less", columns=["rows", "space_logprob"])
    with pytest.raises(XtokenError, match=r"left_out is \[\] and \['text'\]"):
        merged([kept_capture, less], tmp_path / "joined")
    (tmp_path / "c.txt").write_text("A text of its own, a little longer. " * 9)
    run = read_manifest(str(kept_capture), CaptureManifest)
    config = PrecomputeConfig.from_flat(
        corpus=str(tmp_path / "c.txt"),
        teacher=str(tokenizer_file("smollm2")),
        out=str(tmp_path / "bare"),
        backend="fake",
        max_tokens=run.max_tokens,
        k=run.codec.k,
        min_p=run.codec.min_p,
        text=False,
    )
    precompute(config, Silent())
    with pytest.raises(XtokenError, match=r"holds the text of its samples and .*bare does not"):
        merged([kept_capture, tmp_path / "bare"], tmp_path / "joined")


def test_other_devices_and_engines_are_named_together(kept_capture, others, tmp_path):
    one = edited(pulled(others["one"], tmp_path / "one"), set_teacher(device="cuda:7", engine_version="9", context=17))
    teacher = merged([kept_capture, one], tmp_path / "joined").teacher
    assert teacher.device.endswith(" + cuda:7")
    assert teacher.engine_version.endswith(" + 9")
    assert teacher.context == 17


def licensed(corpus: str, outputs: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update(licenses={"corpus": corpus, "outputs": outputs})


def test_licences_of_all_apply(kept_capture, others, tmp_path):
    one = edited(pulled(others["one"], tmp_path / "one"), licensed("cc-by-4.0", "gemma"))
    two = edited(pulled(others["two"], tmp_path / "two"), licensed("mit OR apache-2.0", "gemma"))
    found = merged([one, two], tmp_path / "joined").licenses
    assert found == {"corpus": "cc-by-4.0 AND (mit OR apache-2.0)", "outputs": "gemma"}
    assert merged([one, kept_capture], tmp_path / "unknown").licenses == {}


def test_captures_without_rows_are_joined(kept_capture, others, tmp_path):
    sources = {"kept": kept_capture, "one": others["one"]}
    parts = [pulled(root, tmp_path / name, columns=["text"]) for name, root in sources.items()]
    found = merged(parts, tmp_path / "joined")
    assert found.left_out == read_manifest(str(parts[0]), CaptureManifest).left_out
    assert rows(tmp_path / "joined") == rows(*parts)


def test_a_stopped_merge_goes_on_and_a_damaged_source_stops_it(kept_capture, others, tmp_path, monkeypatch):
    put, names = Destination.put, []

    def some(self: Destination, path: str, name: str) -> None:
        names.append(name)
        if len(names) == 5:
            raise KeyboardInterrupt
        put(self, path, name)

    sources = [kept_capture, others["one"]]
    with monkeypatch.context() as patch:
        patch.setattr(Destination, "put", some)
        with pytest.raises(KeyboardInterrupt):
            merged(sources, tmp_path / "joined")
    assert not (tmp_path / "joined" / "manifest.json").exists()
    with pytest.raises(XtokenError, match="merged: "):
        merged(sources[::-1], tmp_path / "joined")
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "joined" / "commits").glob("*.json")}
    merged(sources, tmp_path / "joined")
    assert done
    assert all((tmp_path / "joined" / "commits" / name).stat().st_mtime_ns == stamp for name, stamp in done.items())
    bad = shutil.copytree(others["one"], tmp_path / "bad")
    whole = (bad / data_name(0)).read_bytes()
    (bad / data_name(0)).write_bytes(whole[:-20] + b"?" + whole[-19:])
    with pytest.raises(VerificationError):
        merged([kept_capture, bad], tmp_path / "again")


def test_draws_are_joined_in_the_codes_of_the_first(tmp_path):
    sources = []
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text, newline="")
        out = str(tmp_path / name)
        config = PrecomputeConfig.from_flat(
            corpus=str(tmp_path / f"{name}.txt"), teacher="bytes", out=out, backend="fake", codec="sampled", draws=20
        )
        precompute(config, Silent())
        sources.append(tmp_path / name)
    joined = merged(sources, tmp_path / "joined")
    assert joined.codec.name == "sampled"
    assert (tmp_path / "one" / "vocab.parquet").read_bytes() != (tmp_path / "two" / "vocab.parquet").read_bytes()
    assert rows(tmp_path / "joined") == rows(*sources)
