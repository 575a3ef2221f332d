"""How ranks share a model: DDP with parameters that text passes by (towers for images), FSDP over several passes.

One process of gloo, which fails as several do.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from xtoken.trainer.data.batches import Loader
from xtoken.trainer.data.layout import Layout
from xtoken.trainer.data.sources import Sources
from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses import open_loss
from xtoken.trainer.objective import Objective, Student
from xtoken.trainer.ranks import Ranks, replicate, shard
from xtoken.trainer.score import score
from xtoken.trainer.student.head import find_head, leaves_some_out
from xtoken.trainer.student.model import load_student

CPU = torch.device("cpu")


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    """A process group of one, met in a file."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def seeing() -> Any:
    """A tiny Gemma 3 of text and images, as AutoModelForCausalLM makes it of such a config.json."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 8}
    text |= {"layer_types": ["full_attention"], "max_position_embeddings": 64, "pad_token_id": None}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    marks = {"image_token_index": 31, "boi_token_index": 30, "eoi_token_index": 29}
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **marks)
    )


def test_what_text_passes_by_is_seen(seeing: Any, student_dir: str) -> None:
    assert leaves_some_out(find_head(seeing))
    for name, parameter in seeing.named_parameters():
        parameter.requires_grad_("language_model" in name)
    assert not leaves_some_out(find_head(seeing)), "what is not trained waits for no gradient"
    assert not leaves_some_out(find_head(load_student(student_dir, CPU, False)))


@pytest.mark.usefixtures("gloo")
def test_two_steps_of_a_model_with_a_tower(make_targets: Callable[..., str], pair: Any, seeing: Any) -> None:
    """Without that knowledge the second step waits for gradients that never come, and DDP raises."""
    loss = open_loss("p-kl", pair.setup())
    sources, layout = Sources([Targets(make_targets([[9, 12, 5]]))]), Layout(0, 32, 24, (loss,))
    with Loader(sources, layout, step_tokens=30, micro_tokens=64, seed=0, packing=False) as loader:
        micro = loader.step().micros[0]
    student = Student(seeing, CPU, None, 24)
    wrapped = replicate(Objective(student, [loss]), leaves_some_out(student.head))
    for _ in range(2):
        value, _ = wrapped(score, micro, (0.5, 0.5))
        value.backward()
    grads = {name: one.grad is not None for name, one in seeing.named_parameters()}
    assert all(has == ("language_model" in name) for name, has in grads.items())
    blind = replicate(Objective(student, [loss]), some_left_out=False)
    blind(score, micro, (0.5, 0.5))[0].backward()
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        blind(score, micro, (0.5, 0.5))


@pytest.mark.usefixtures("gloo")
def test_a_sharded_gradient_is_never_kept_whole(
    make_targets: Callable[..., str], pair: Any, student_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three passes of a step leave the gradient of one over all of them, in shards after each."""
    loss = open_loss("p-kl", pair.setup())
    sources, layout = Sources([Targets(make_targets([[9, 12, 5], [6, 8]]))]), Layout(0, 32, 24, (loss,))
    with Loader(sources, layout, step_tokens=60, micro_tokens=12, seed=0, packing=False) as loader:
        micros = loader.step().micros[:3]
    plain = Objective(Student(load_student(student_dir, CPU, False), CPU, None, 24), [loss])
    for micro in micros:
        plain(score, micro, (0.5, 0.5))[0].backward()
    wanted = {name: one.grad for name, one in plain.named_parameters()}
    sharded = shard(Objective(Student(load_student(student_dir, CPU, False), CPU, None, 24), [loss]), Ranks(), None)
    for at, micro in enumerate(micros):
        Ranks(size=2).synchronise(sharded, at == len(micros) - 1)
        sharded(score, micro, (0.5, 0.5))[0].backward()
        # one that is kept whole is not seen among the shards before the last pass
        assert all(isinstance(one.grad, DTensor) for one in sharded.parameters())
    for name, one in sharded.named_parameters():
        assert one.grad is not None
        torch.testing.assert_close(one.grad.full_tensor(), wanted[name], msg=name)
