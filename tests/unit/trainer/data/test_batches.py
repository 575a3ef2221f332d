"""Order, resume, batching and what is refused when target folders are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.trainer.data import plan
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.micro_batch import split_micros
from xtoken.trainer.data.plan import Position
from xtoken.trainer.data.samples import Sample, context_token, read_sample
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses.base import Loss, View
from xtoken.trainer.ragged import Columns, Ragged

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10], [13, 4, 9, 9, 3, 7]]
TOTAL = sum(map(len, LENGTHS))


class Reads(Loss):
    """A loss that says which columns it reads; batching asks for nothing else."""

    def __init__(self, name: str) -> None:
        self.columns = Columns.of(name)  # type: ignore[misc]
        self.per = "token" if name == "byte-prefix" else "chunk"  # type: ignore[misc]

    def terms(self, view: View) -> Any:
        raise NotImplementedError


PKL, PREFIX = Reads("p-kl"), Reads("byte-prefix")


def layout(context: int | None = 0, max_tokens: int = 32, loss: Loss = PKL) -> Layout:
    return Layout(context, max_tokens, 24, (loss,))


def loader(root: str, seed: int = 0, position: Position | None = None, **options: Any) -> Loader:
    sizes = {"step_tokens": 20, "micro_tokens": 16} | options
    return Loader(Sources([Targets(root)]), layout(), seed=seed, positions=position and (position,), **sizes)


def epoch_ids(steps: list[Any]) -> list[str]:
    return [sample_id for step in steps for sample_id in step.sample_ids]


@pytest.mark.parametrize("window", [1, 4, 1024])
def test_every_sample_once_an_epoch(
    make_targets: Callable[..., str], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(plan, "WINDOW_SAMPLES", window)
    one_by_one = loader(make_targets(LENGTHS), step_tokens=1)
    ids = epoch_ids([one_by_one.step() for _ in range(2 * TOTAL)])
    assert len(set(ids[:TOTAL])) == TOTAL
    assert sorted(ids[:TOTAL]) == sorted(ids[TOTAL:])
    assert ids[:TOTAL] != ids[TOTAL:], "each epoch has its own order"


def test_order_follows_the_seed(make_targets: Callable[..., str]) -> None:
    root = make_targets(LENGTHS)
    orders = [epoch_ids([one.step() for _ in range(6)]) for one in (loader(root, 1), loader(root, 1), loader(root, 2))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@pytest.mark.parametrize("window", [3, 1024])
def test_resume_from_every_position(
    make_targets: Callable[..., str], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Over more than two epochs, whatever step it stops after."""
    monkeypatch.setattr(plan, "WINDOW_SAMPLES", window)
    root = make_targets(LENGTHS)
    whole = loader(root)
    steps = [whole.step() for _ in range(16)]
    assert steps[-1].positions[0].epoch >= 1
    for done in range(16):
        position = steps[done - 1].positions[0] if done else Position()
        again = loader(root, position=position)
        for step in steps[done:]:
            resumed = again.step()
            assert resumed.sample_ids == step.sample_ids
            assert resumed.positions == again.positions == step.positions
            np.testing.assert_array_equal(resumed.micros[0].input_BL, step.micros[0].input_BL)


def test_steps_and_micro_batches_keep_their_sizes(make_targets: Callable[..., str]) -> None:
    stream = loader(make_targets(LENGTHS), step_tokens=30, micro_tokens=24)
    for _ in range(10):
        step = stream.step()
        assert abs(step.tokens - 30) <= max(map(max, LENGTHS)) / 2
        assert step.predicted == sum(len(micro.label_P) for micro in step.micros) == step.tokens
        for micro in step.micros:
            assert micro.input_BL.size <= 24
            length_B = np.bincount(micro.sample_P)
            assert list(length_B) == sorted(length_B, reverse=True)


def test_a_sample_longer_than_a_step_stands_alone(make_targets: Callable[..., str]) -> None:
    stream = loader(make_targets([[30, 30]]), step_tokens=8, micro_tokens=8)
    step = stream.step()
    assert len(step.sample_ids) == 1
    assert step.tokens == 30


def test_a_step_holds_no_sample_twice(make_targets: Callable[..., str]) -> None:
    stream = loader(make_targets([[5, 6]]), step_tokens=1000)
    assert sorted(stream.step().sample_ids) == ["doc0#0", "doc0#1"]
    assert stream.step().positions == (Position(1, 2),)


def read_first(root: str, shape: Layout) -> tuple[Sample, Any]:
    targets = Targets(root)
    group = targets.read(targets.groups[0], shape.columns(0))
    return read_sample([(group, 0)], shape), group


def only(sample: Sample) -> Ragged[Any]:
    (targets,) = sample.targets
    assert targets is not None
    return targets


def test_positions_with_and_without_context(make_targets: Callable[..., str]) -> None:
    """Chunks end after tokens 1, 3, 4, 6, 7; the last has no teacher row."""
    root = make_targets([[7, 7]])
    sample, group = read_first(root, layout(context=0))
    ids = group.values("student_ids", 0)
    assert group.values("chunk_student_end", 0).tolist() == [1, 3, 4, 6, 7]
    np.testing.assert_array_equal(sample.sequence, [0, *ids])
    assert only(sample).first_C.tolist() == [0, 1, 3, 4]
    bare, _ = read_first(root, layout(context=None))
    np.testing.assert_array_equal(bare.sequence, ids)
    assert only(bare).first_C.tolist() == [0, 2, 3], "without context the chunk at token 0 is not predicted"
    counts = group.values("pkl_count", 0)
    np.testing.assert_array_equal(only(bare).columns["pkl_count"], counts[1:4])
    kept = group.values("pkl_ids", 0)[counts[0] : counts[:4].sum()]
    np.testing.assert_array_equal(only(bare).columns["pkl_ids"], kept)


def test_a_cut_keeps_only_whole_chunks(make_targets: Callable[..., str]) -> None:
    root = make_targets([[12, 12]])
    sample, group = read_first(root, layout(max_tokens=5))
    assert len(sample.sequence) == 6
    assert sample.cut == len(group.values("student_ids", 0)) - 5 > 0
    assert read_first(root, layout())[0].cut == 0
    assert only(sample).first_C.tolist() == [0, 1, 3]
    assert len(only(sample).columns["pkl_rest_logprob"]) == 3


def test_micro_batch_places_and_chunks() -> None:
    columns = {
        "pkl_rest_logprob": np.zeros(1),
        "pkl_count": np.array([2]),
        "pkl_ids": np.array([4, 5]),
        "pkl_logprob": np.zeros(2),
    }
    other = columns | {"pkl_ids": np.array([6, 7])}
    one = np.array([1])
    short = Sample("short", np.array([0, 7, 8], np.int32), (Ragged(one, one, one * -1, columns, PKL.columns),), (1.0,))
    long = Sample(
        "long", np.array([0, 3, 4, 5, 6], np.int32), (Ragged(one * 2, one, one * 3, other, PKL.columns),), (0.5,)
    )
    (micro,) = split_micros([short, long], 64, [PKL])
    assert micro.sample_ids == ("long", "short")
    np.testing.assert_array_equal(micro.input_BL, [[0, 3, 4, 5], [0, 7, 0, 0]])
    np.testing.assert_array_equal(micro.position_BL, [[0, 1, 2, 3], [0, 1, 0, 1]])
    np.testing.assert_array_equal(micro.place_P, [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(micro.label_P, [3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(micro.sample_P, [0, 0, 0, 0, 1, 1])
    (targets,) = micro.targets
    np.testing.assert_array_equal(targets.first_C, [2, 5])
    np.testing.assert_array_equal(targets.next_C, [3, -1])
    np.testing.assert_array_equal(targets.sample_C, [0, 1])
    np.testing.assert_array_equal(targets.weight_B, [0.5, 1.0])
    np.testing.assert_array_equal(targets.slice(3, 6).columns["pkl_ids"], [4, 5])
    np.testing.assert_array_equal(targets.slice(0, 3).columns["pkl_ids"], [6, 7])
    assert len(targets.slice(0, 2).columns["pkl_ids"]) == 0


@pytest.mark.parametrize("context", [0, None])
def test_token_columns_follow_the_predicted_tokens(make_targets: Callable[..., str], context: int | None) -> None:
    """Without a context token the first token, and its entries, drop out; a cut drops the last ones."""
    root = make_targets([[9, 9]], losses=("byte-prefix",))
    sample, group = read_first(root, layout(context, 5, PREFIX))
    low = 0 if context is not None else 1
    counts, ids = group.values("prefix_count", 0), group.values("prefix_ids", 0)
    np.testing.assert_array_equal(only(sample).columns["prefix_count"], counts[low:5])
    np.testing.assert_array_equal(only(sample).columns["prefix_ids"], ids[counts[:low].sum() : counts[:5].sum()])
    (micro,) = split_micros([sample], 64, [PREFIX])
    assert len(micro.targets[0].columns["child_count"]) == len(micro.label_P)
    piece = micro.targets[0].slice(1, 3).columns
    np.testing.assert_array_equal(piece["prefix_count"], counts[low + 1 : low + 3])
    assert len(piece["prefix_ids"]) == counts[low + 1 : low + 3].sum()


def test_chunks_know_their_length_and_what_follows(make_targets: Callable[..., str]) -> None:
    """Chunks end after tokens 1, 3, 4, 6, 7; the last has no teacher row, yet follows the one before."""
    root = make_targets([[7, 7]])
    whole = only(read_first(root, layout())[0])
    assert whole.length_C.tolist() == [1, 2, 1, 2]
    assert whole.next_C.tolist() == [1, 3, 4, 6]
    bare = only(read_first(root, layout(context=None))[0])
    assert bare.next_C.tolist() == [2, 3, 5]
    short = only(read_first(root, layout(max_tokens=4))[0])
    assert short.next_C.tolist() == [1, 3, -1], "the token after the last chunk is cut off"


def test_samples_without_anything_to_predict(make_targets: Callable[..., str]) -> None:
    root = make_targets([[1, 1]])
    bare = Loader(Sources([Targets(root)]), layout(context=None), step_tokens=8, micro_tokens=8, seed=0)
    with pytest.raises(XtokenError, match="no token that the student can predict"):
        bare.step()


def test_context_token_choice(student_info: Any) -> None:
    assert context_token(student_info) == 0
    assert context_token(student_info.model_copy(update={"adds_bos": False})) == 1
    assert context_token(student_info.model_copy(update={"adds_bos": False, "eos_id": None})) is None


def test_hkl_chunk_with_entries_on_one_side_only_is_valid(make_targets: Callable[..., str]) -> None:
    sample, group = read_first(make_targets([[7, 7]]), layout(loss=Reads("h-kl")))
    both = group.values("hkl_common_count", 0) + group.values("hkl_other_count", 0)
    assert len(only(sample).first_C) == int((both > 0).sum()) == 4


def rewrite(root: str, change: Callable[[dict[str, list[Any]]], None]) -> None:
    path = Path(root) / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=table.schema), path, row_group_size=2)


@pytest.mark.parametrize("name", ["student_ids", "chunk_student_end", "pkl_count", "pkl_logprob", "pkl_rest_logprob"])
def test_a_sample_that_contradicts_itself_is_named(make_targets: Callable[..., str], name: str) -> None:
    root = make_targets([[6, 6]])
    rewrite(root, lambda columns: columns[name][0].__setitem__(-1 if name != "pkl_rest_logprob" else 0, 40))
    with pytest.raises(VerificationError, match="'doc0#0'"):
        read_first(root, layout())


def test_damaged_folders_are_refused(make_targets: Callable[..., str], tmp_path: Path) -> None:
    root = make_targets([[6, 6]])
    (Path(root) / "data" / "part-00000.parquet").unlink()
    with pytest.raises(VerificationError, match="not on disk"):
        Targets(root)
    root = make_targets([[6, 6]], name="short")
    rewrite(root, lambda columns: [column.pop() for column in columns.values()])  # type: ignore[arg-type,func-returns-value]
    with pytest.raises(VerificationError, match="holds 1 samples, its manifest says 2"):
        Targets(root)
    with pytest.raises(XtokenError, match="holds no samples"):
        Targets(make_targets([], name="empty"))
    with pytest.raises(XtokenError, match="does not exist"):
        Targets(str(tmp_path / "nowhere"))


def test_altered_side_tables_are_refused(make_targets: Callable[..., str]) -> None:
    root = make_targets([[6, 6]])
    targets = Targets(root)
    assert len(targets.w.weight) > 0
    with open(f"{root}/w.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(VerificationError, match=r"w\.parquet has sha256"):
        _ = Targets(root).w
    Path(root, "student_vocab.parquet").unlink()
    with pytest.raises(VerificationError, match="student_vocab"):
        _ = Targets(root).needed_width


def test_only_parts_of_the_manifest_are_read(make_targets: Callable[..., str]) -> None:
    root = make_targets(LENGTHS)
    path = Path(root) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parts"] = manifest["parts"][1:2]
    path.write_text(json.dumps(manifest))
    ids = epoch_ids([loader(root, step_tokens=1).step()])
    assert Targets(root).samples == 3
    assert ids[0].startswith("doc1#")


def test_targets_are_read_from_any_fsspec_url(make_targets: Callable[..., str]) -> None:
    import fsspec

    root = make_targets(LENGTHS)
    memory = fsspec.filesystem("memory")
    memory.put(root, "/targets-url", recursive=True)
    url = "memory://targets-url"
    assert loader(url).step().sample_ids == loader(root).step().sample_ids
    assert len(Targets(url).w.weight) == len(Targets(root).w.weight)
