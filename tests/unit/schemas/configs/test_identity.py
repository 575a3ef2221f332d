"""What a rerun of a folder may change: nothing that is not marked."""

from typing import Any

import pytest
from pydantic import Field

from xtoken.pipeline.align.run_identity import run_settings as align_settings
from xtoken.pipeline.capture.plan import make_plan
from xtoken.pipeline.capture.run_identity import run_settings as capture_settings
from xtoken.pipeline.project.stops import StopPair
from xtoken.pipeline.tokens import load_tokenizer
from xtoken.schemas.configs import base
from xtoken.schemas.configs.artifacts import AlignConfig
from xtoken.schemas.configs.base import MAY_CHANGE, Config, leaves, marked
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.configs.identity import defaults, differences, identity, may_change
from xtoken.schemas.configs.imports import ImportConfig
from xtoken.schemas.configs.train import OptimGroup, TrainConfig
from xtoken.schemas.ui.progress import Silent

RUNS: dict[type[Config], dict[str, Any]] = {
    TrainConfig: {"targets": ["t"], "student": "s", "out": "o"},
    PrecomputeConfig: {"corpus": "c", "teacher": "t", "backend": "fake", "out": "o"},
    AlignConfig: {"captures": ["c"], "student": "bytes", "out": "o"},
    ImportConfig: {"format": "distillkit", "paths": ["p"], "tokenizer": "t", "out": "o"},
}
MARKS = [base.MAY_CHANGE, base.IN_PLAN, base.AS_HASH, base.AS_FOR]


class Later(OptimGroup):
    """A group of a later release, whose new field nobody thought of."""

    forgotten: float = Field(0.5, description="New.")


class LaterTrain(TrainConfig):
    """A later release's."""

    optim: Later


def test_a_field_without_a_mark_decides_whose_run_it_is() -> None:
    before, now = (LaterTrain.from_flat(**RUNS[TrainConfig], forgotten=value) for value in (0.5, 0.6))
    differ = differences(identity(before), identity(now), defaults(LaterTrain))
    assert [str(one) for one in differ] == ["forgotten: 0.5 there, 0.6 now"]


def test_a_record_from_before_there_was_the_field_means_its_default() -> None:
    record = identity(TrainConfig.from_flat(**RUNS[TrainConfig]))
    same, other = (LaterTrain.from_flat(**RUNS[TrainConfig], forgotten=value) for value in (0.5, 0.6))
    assert differences(record, identity(same), defaults(LaterTrain)) == []
    assert [one.name for one in differences(record, identity(other), defaults(LaterTrain))] == ["forgotten"]


def test_a_marked_field_does_not() -> None:
    one, other = (TrainConfig.from_flat(**RUNS[TrainConfig], keep=keep) for keep in (2, 3))
    assert identity(one) == identity(other)
    assert "keep" in may_change(TrainConfig)


@pytest.mark.parametrize("model", RUNS, ids=lambda model: model.__name__)
def test_every_field_is_identity_or_marked(model: type[Config]) -> None:
    """A mark is one of those that somebody thought about; the rest is recorded."""
    known = [mark["resume"] for mark in MARKS]
    recorded = identity(model.from_flat(**RUNS[model]))
    for leaf in leaves(model):
        mark = marked(leaf.field, "resume")
        assert mark in known if mark is not None else leaf.name in recorded, leaf.name


TRAIN = """targets out device decoders parallel activation_checkpointing compile kernel micro_tokens save_every keep
keep_every spike rollback eval_every completions tensorboard wandb"""
IMPORT = "out dry_run"
ALIGN = "out corpus workers ray lease_seconds memory_limit on_bad"
PRECOMPUTE = """on_rendered workers tensor_parallel gpu_memory batch_tokens device trust_remote_code out ray
gpus_per_worker lease_seconds cell audit audit_rows dry_run gpu_price pilot pilot_tokens like log tokenizer server
served_as server_requests insecure"""


@pytest.mark.parametrize(
    ("model", "names"),
    [(TrainConfig, TRAIN), (AlignConfig, ALIGN), (PrecomputeConfig, PRECOMPUTE), (ImportConfig, IMPORT)],
)
def test_what_may_change_is_frozen(model: type[Config], names: str) -> None:
    """One more name here lets different runs fill one folder; say why in the field's description."""
    assert set(may_change(model)) - set(names.split()) == set()


def test_a_capture_records_every_field_without_a_mark(tmp_path: Any) -> None:
    """In run.json by name, or in plan.json where the mark says so; what 0.5.0 did not have, where it says something."""
    (tmp_path / "c.txt").write_text("text")
    config = PrecomputeConfig.from_flat(
        **RUNS[PrecomputeConfig] | {"corpus": str(tmp_path / "c.txt"), "split": ["all"]}
    )
    table = load_tokenizer("bytes").table
    settings = capture_settings(config, table, None)
    assert identity(config).keys() - settings.keys() == {
        *("space", "turns", "long", "learn", "template_arg", "generate", "temperature", "top_p", "samples")
    }
    other = capture_settings(config.changed(space="paper"), table, None)
    assert other == settings | {"space": "paper"}
    plan = make_plan(config.corpus, config.run.shard_bytes, Silent())
    written = {**plan.corpus.options, "corpus": plan.corpus.source, "shard_bytes": plan.shard_bytes}
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "Hi", "completion": "Hello"}')
    chat_plan = make_plan(config.changed(corpus=str(chats)).corpus, 1, Silent(), date="2026-07-04")
    assert chat_plan.corpus.options["form"] == "prompt"
    written |= {"form": chat_plan.corpus.options["form"], "date": chat_plan.date}
    assert not {"form", "date"} & {*plan.corpus.options, *plan.model_dump()}, "plans of text are as ever"
    in_plan = [leaf.name for leaf in leaves(PrecomputeConfig) if marked(leaf.field, "resume") == base.IN_PLAN["resume"]]
    assert sorted(in_plan) == sorted(written)
    assert "student_hash" in settings, "the one field that is recorded as a hash"


def test_targets_record_every_field_without_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("xtoken.pipeline.align.run_identity.content_hash", lambda _: "c")
    projection: Any = SimpleNamespace(student=SimpleNamespace(hash="s"), hash="w")
    config = AlignConfig.from_flat(**RUNS[AlignConfig])
    settings = align_settings(config, projection, projection)
    every = identity(config).keys() | {"capture", "student", "w", "for"}
    # texts go through no chat template, and their records know of none
    assert every - {"template_arg"} == settings.keys()
    chat: Any = SimpleNamespace(template="t")
    of_chat = align_settings(config, projection, projection, chat, StopPair(1, 2, 3))
    assert of_chat == settings | {"template_arg": [], "template": "t", "stops": [1, 2, 3]}
    assert of_chat.keys() == every | {"template", "stops"}
    assert AlignConfig.settings_of({**of_chat, "w": "0" * 64}) == identity(config) | {"for": ["p-kl"]}


def test_flat_names_are_unique() -> None:
    for model in RUNS:
        names = [leaf.name for leaf in leaves(model)]
        assert len(set(names)) == len(names)
        config = model.from_flat(**RUNS[model])
        assert model.from_flat(**config.to_flat()) == config
        assert config.changed(out="other").out == "other"  # type: ignore[attr-defined]
    assert MAY_CHANGE["resume"] == "may change"
