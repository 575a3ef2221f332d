"""Targets as a torch dataset: order, shares, resume, batches."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from xtoken import XtokenError, open_targets, targets_dataset
from xtoken.schemas.chat import ChatInfo
from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets

LENGTHS = [[9, 12, 5, 7, 11], [6, 8, 10], [13, 4, 9, 9, 3, 7]]
TOTAL = sum(map(len, LENGTHS))
EVERY = sorted(f"doc{part}#{at}" for part, sizes in enumerate(LENGTHS) for at in range(len(sizes)))


def ids_of(samples: Any) -> list[str]:
    return [sample.sample_id for sample in samples]


def test_an_epoch_has_every_sample_once_and_the_next_another_order(make_targets: Callable[..., str]) -> None:
    dataset = targets_dataset(make_targets(LENGTHS), seed=3)
    first, second = ids_of(dataset), ids_of(dataset)
    assert sorted(first) == sorted(second) == EVERY
    assert first != second
    assert ids_of(targets_dataset(dataset.asked.urls, seed=3)) == first


def test_the_order_is_that_of_the_trainer(make_targets: Callable[..., str]) -> None:
    root = make_targets(LENGTHS)
    dataset = targets_dataset(root, seed=5)
    layout = dataset._layout()
    with Loader(Sources([Targets(root)]), layout, step_tokens=1, micro_tokens=1, seed=5) as loader:
        assert ids_of(dataset) == [one for _ in range(TOTAL) for one in loader.step().sample_ids]


@pytest.mark.parametrize("taken", [0, 1, 6, TOTAL])
def test_resume_is_exact(make_targets: Callable[..., str], taken: int) -> None:
    root = make_targets(LENGTHS)
    whole = targets_dataset(root)
    two_epochs = ids_of(whole) + ids_of(whole)
    stopped, reader = targets_dataset(root), None
    reader = iter(stopped)
    before = [next(reader).sample_id for _ in range(taken)]
    state = stopped.state_dict()
    gone_on = targets_dataset(root)
    gone_on.load_state_dict(state)
    after = ids_of(gone_on)
    assert before + after == two_epochs[:TOTAL]
    assert ids_of(gone_on) == two_epochs[TOTAL:]


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (1, 2), (2, 2)])
def test_ranks_and_workers_share_an_epoch(make_targets: Callable[..., str], ranks: int, workers: int) -> None:
    root, seen = make_targets(LENGTHS), list[str]()
    for rank in range(ranks):
        dataset = targets_dataset(root, share=(rank, ranks))
        batches = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate, num_workers=workers)
        seen += [one for batch in batches for one in batch["targets"].sample_ids]
    assert sorted(seen) == EVERY


def test_with_workers_torchdata_keeps_the_state(make_targets: Callable[..., str]) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    root = make_targets(LENGTHS)

    def loader() -> Any:
        dataset = targets_dataset(root)
        return StatefulDataLoader(dataset, batch_size=2, collate_fn=dataset.collate, num_workers=2)

    whole = [batch["targets"].sample_ids for batch in loader()]
    stopped = loader()
    batches = iter(stopped)
    before = [next(batches)["targets"].sample_ids for _ in range(3)]
    gone_on = loader()
    gone_on.load_state_dict(stopped.state_dict())
    assert before + [batch["targets"].sample_ids for batch in gone_on] == whole


def test_the_environment_names_the_share(make_targets: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = make_targets(LENGTHS), list[str]()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        seen += ids_of(targets_dataset(root))
    assert sorted(seen) == EVERY


def test_an_epoch_can_be_chosen(make_targets: Callable[..., str]) -> None:
    dataset = targets_dataset(make_targets(LENGTHS))
    first, second = ids_of(dataset), ids_of(dataset)
    dataset.set_epoch(0)
    assert ids_of(dataset) == first
    assert ids_of(dataset) == second
    dataset.load_state_dict({"epoch": 1, "taken": 4, "streams": 1})
    dataset.set_epoch(1)  # as Trainer does when it goes on within an epoch
    assert ids_of(dataset) == second[4:]


def test_a_state_of_other_readers_is_refused(make_targets: Callable[..., str]) -> None:
    dataset = targets_dataset(make_targets(LENGTHS))
    dataset.load_state_dict({"epoch": 0, "taken": 4, "streams": 2})
    with pytest.raises(XtokenError, match=r"saved by 2 readers .* there are 1"):
        iter(dataset)


@pytest.mark.parametrize("pack", [False, True])
def test_batches_hold_every_token_once(make_targets: Callable[..., str], pack: bool) -> None:
    root = make_targets(LENGTHS)
    tokens = {sample.sample_id: sample.student_ids for sample in open_targets(root)}
    dataset = targets_dataset(root, pack=pack, max_tokens=24)
    samples = list(dataset)
    batch = pickle.loads(pickle.dumps(dataset)).collate(samples)
    rows, width = batch["input_ids"].shape
    assert ("position_ids" in batch) == pack
    assert rows == TOTAL if not pack else rows < TOTAL
    assert width <= (24 if pack else max(map(max, LENGTHS)))
    found, micro = dict[str, list[int]](), batch["targets"].micro
    for place, at in zip(micro.place_P, micro.sample_P, strict=True):
        found.setdefault(micro.sample_ids[at], []).append(int(micro.input_BL.flat[place]))
    for name, inputs in found.items():
        assert inputs == [0, *tokens[name][:-1].tolist()]  # BOS and all but the last
    assert len(found) == TOTAL
    if pack:
        np.testing.assert_array_equal(batch["position_ids"], micro.position_BL)


def test_of_conversations_only_samples_with_something_taught(
    make_targets: Callable[..., str], chat_info: ChatInfo
) -> None:
    root = make_targets([[9, 12, 2, 7], [2, 8, 10]], step=0.03125, chat=chat_info)
    taught = [one.sample_id for one in open_targets(root) if one.columns["learn"][1:].any()]
    dataset = targets_dataset(root)
    assert sorted(ids_of(dataset)) == sorted(taught)
    assert 0 < len(taught) < 7
    assert sorted(ids_of(dataset)) == sorted(taught)


def test_what_does_not_fit_is_refused_when_it_is_opened(make_targets: Callable[..., str], student_info: Any) -> None:
    root = make_targets(LENGTHS, losses=("p-kl",))
    with pytest.raises(XtokenError, match="no columns for loss 'alm'"):
        targets_dataset(root, loss="alm")
    with pytest.raises(XtokenError, match="loss 'kl' is unknown"):
        targets_dataset(root, loss="kl")
    with pytest.raises(XtokenError, match="kl"):
        targets_dataset(root, kl="sideways")
    with pytest.raises(XtokenError, match="has no option 'ce_weight'; of the loss it takes kl, rest"):
        targets_dataset(root, ce_weight=0.5)  # of the objective, and so of distillation_loss
    with pytest.raises(XtokenError, match=r"share is \(2, 2\)"):
        targets_dataset(root, share=(2, 2))
    with pytest.raises(XtokenError, match=f"{TOTAL} samples cannot be shared by {TOTAL + 1} readers"):
        list(targets_dataset(root, share=(0, TOTAL + 1)))
    with pytest.raises(XtokenError, match="2 losses for 1 target folders"):
        targets_dataset(root, loss=["p-kl", "p-kl"])
    other = make_targets(LENGTHS, "other", student=student_info.model_copy(update={"hash": "f" * 64}))
    with pytest.raises(XtokenError, match="other tokenizers"):
        targets_dataset([root, other])


def test_targets_that_changed_are_refused(make_targets: Callable[..., str], tmp_path: Any) -> None:
    root = make_targets(LENGTHS)
    dataset = targets_dataset(root)
    make_targets([[5, 6]], "others", seed=4)
    (tmp_path / "targets").rename(tmp_path / "away")
    (tmp_path / "others").rename(tmp_path / "targets")
    with pytest.raises(XtokenError, match="other targets than when the dataset was opened"):
        dataset.asked.opened(23, torch.device("cpu"))


def test_targets_as_arrays(make_targets: Callable[..., str]) -> None:
    root = make_targets(LENGTHS)
    found = open_targets(root)
    assert (len(found), found.losses, found.parts) == (TOTAL, ("p-kl", "h-kl"), (0, 1, 2))
    samples = list(found)
    assert ids_of(samples) == EVERY
    assert ids_of(found.part(1)) == ["doc1#0", "doc1#1", "doc1#2"]
    frame = found.to_pandas(parts=[1])
    assert frame["sample_id"].tolist() == ["doc1#0", "doc1#1", "doc1#2"]
    for sample, (_, row) in zip(found.part(1), frame.iterrows(), strict=True):
        for name, values in sample.columns.items():
            np.testing.assert_array_equal(np.atleast_1d(row[name]), values)
        assert sample.chunk_student_end[-1] == len(sample.student_ids) == len(sample.student_end)
        assert len(sample.columns["pkl_ids"]) == sample.columns["pkl_count"].sum()
    assert next(found.batches(["student_ids"])).schema.names == ["student_ids"]
    with pytest.raises(XtokenError, match="no column 'nothing'"):
        next(found.batches(["nothing"]))
    with pytest.raises(XtokenError, match="no part 9"):
        found.part(9)
