"""Models of one tokenizer as one: against probabilities averaged by hand, through eval and through generate."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.ensemble import Ensemble
from xtoken.trainer.evaluate import EvalSample, evaluate
from xtoken.trainer.student.model import load_student

SAMPLES = [
    EvalSample(np.array([3, 4, 5, 6, 1], np.int32), 9, 2, "a#0", "web"),
    EvalSample(np.array([7, 8], np.int32), 3, 1, "b#0", "code"),
]
V = 24
ROUNDING = 1e-5  # of float32 log-probabilities


@pytest.fixture
def students(tmp_path: Path) -> list[str]:
    """Two tiny random Llamas whose heads are wider than the vocabulary, one wider than the other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = []
    for seed, padding in ((3, 8), (4, 40)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=V + padding,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.3,
        )
        folders.append(str(tmp_path / f"student-{seed}"))
        LlamaForCausalLM(config).save_pretrained(folders[-1])
    return folders


def load(folders: list[str]) -> list[Any]:
    return [load_student(folder, torch.device("cpu"), False) for folder in folders]


def by_hand(models: list[Any], sequences: list[list[int]], combine: str) -> torch.Tensor:
    """[L, V] float64: the combined log-probabilities of the sequence that each model is shown."""
    with torch.no_grad():
        logp = [
            model(torch.tensor([sequence])).logits[0, :, :V].double().log_softmax(-1)
            for model, sequence in zip(models, sequences, strict=True)
        ]
    mean = sum(one.exp() for one in logp) / len(logp) if combine == "prob" else (sum(logp) / len(logp)).softmax(-1)
    return torch.log(mean)


@pytest.mark.parametrize("combine", ["prob", "logit"])
@pytest.mark.parametrize("alike", [True, False])
def test_bits_per_byte_of_averaged_distributions(
    students: list[str], student_info: Any, combine: str, alike: bool
) -> None:
    """BOS first for both; or BOS for the first and eos, its document separator, for the second."""
    other = student_info.model_copy(update={"adds_bos": alike})
    config = EvalConfig(model=students, combine=combine, text="given", max_tokens=32, device="cpu")
    figures = evaluate(config, student_info, SAMPLES, Silent(), others=[other])
    bits = 0.0
    for sample in SAMPLES:
        ids = sample.ids.tolist()
        logp = by_hand(load(students), [[0, *ids], [0 if alike else 1, *ids]], combine)
        bits -= float(sum(logp[i, token] for i, token in enumerate(ids))) / math.log(2)
    assert figures["bits_per_byte"] == pytest.approx(bits / 12, rel=1e-6)
    assert set(figures["by_source"]) == {"web", "code"}


@pytest.mark.parametrize("combine", ["prob", "logit"])
def test_equal_models_are_one(
    students: list[str], student_info: Any, make_targets: Callable[..., str], combine: str
) -> None:
    root = make_targets([[5, 9, 7]])
    alone = EvalConfig(model=students[0], text="given", targets=root, max_tokens=32, device="cpu")
    twice = EvalConfig(
        model=[students[0]] * 2, combine=combine, text="given", targets=root, max_tokens=32, device="cpu"
    )
    one = evaluate(alone, student_info, SAMPLES, Silent())
    two = evaluate(twice, student_info, SAMPLES, Silent(), others=[student_info])
    assert one.keys() == two.keys()
    for name in ("bits_per_byte", "kl"):
        assert two[name] == pytest.approx(one[name], abs=ROUNDING)
    assert (two["top1_agreement"], two["chunks"]) == (one["top1_agreement"], one["chunks"])


def test_the_kl_to_the_teacher_is_that_of_the_mean(
    students: list[str], student_info: Any, make_targets: Callable[..., str]
) -> None:
    """The KL is convex: that of the mean of two is below the mean of theirs, and is neither's."""
    root = make_targets([[5, 9, 7], [8]])
    kl = [
        evaluate(EvalConfig(model=one, targets=root, max_tokens=32, device="cpu"), student_info, [], Silent())["kl"]
        for one in students
    ]
    config = EvalConfig(model=students, combine="prob", targets=root, max_tokens=32, device="cpu")
    both = evaluate(config, student_info, [], Silent(), others=[student_info])["kl"]
    assert both < sum(kl) / 2 - 1e-3
    assert min(abs(both - one) for one in kl) > 1e-3


@pytest.mark.parametrize("combine", ["prob", "logit"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_a_loop_over_averages(students: list[str], combine: Any, use_cache: bool) -> None:
    models = load(students)
    ensemble = Ensemble(models, combine, V)
    prompt, ids = torch.tensor([[0, 5, 9, 3]]), [0, 5, 9, 3]
    written = ensemble.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=V + 1, use_cache=use_cache)
    for _ in range(12):
        ids.append(int(by_hand(models, [ids, ids], combine)[-1].argmax()))
    assert written[0].tolist() == ids


def test_generate_with_beams_and_padding(students: list[str]) -> None:
    """Caches of both models follow the beams, and a row padded on the left is written as alone."""
    ensemble = Ensemble(load(students), "prob", V)
    rows, options = [[0, 5, 9, 3], [0, 7]], {"max_new_tokens": 6, "num_beams": 3, "eos_token_id": V + 1}
    alone = [ensemble.generate(torch.tensor([row]), do_sample=False, **options)[0, len(row) :] for row in rows]
    uncached = ensemble.generate(torch.tensor([rows[0]]), do_sample=False, use_cache=False, **options)[0, 4:]
    padded, mask = torch.tensor([rows[0], [1, 1, *rows[1]]]), torch.tensor([[1] * 4, [0, 0, 1, 1]])
    both = ensemble.generate(padded, attention_mask=mask, pad_token_id=1, do_sample=False, **options)[:, 4:]
    assert both.tolist() == [one.tolist() for one in alone]
    assert uncached.tolist() == alone[0].tolist()


def test_each_model_begins_with_its_own_token(students: list[str]) -> None:
    models = load(students)
    ensemble = Ensemble(models, "prob", V, contexts=[0, 1])
    with torch.no_grad():
        logp = ensemble(torch.tensor([[0, 5, 0, 3]])).logits[0]
    torch.testing.assert_close(
        logp.double(), by_hand(models, [[0, 5, 0, 3], [1, 5, 0, 3]], "prob"), rtol=0, atol=ROUNDING
    )
    written = ensemble.generate(torch.tensor([[0, 5]]), max_new_tokens=5, do_sample=False, eos_token_id=V + 1)
    ids = [5]
    for _ in range(5):
        ids.append(int(by_hand(models, [[0, *ids], [1, *ids]], "prob")[-1].argmax()))
    assert written[0, 1:].tolist() == ids


def test_a_model_without_a_cache(students: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    models = load(students)
    real = models[1].forward

    def forward(input_ids: torch.Tensor, past_key_values: Any, attention_mask: Any, use_cache: bool) -> Any:
        assert past_key_values is None or not use_cache
        output = real(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        output.past_key_values = None
        return output

    monkeypatch.setattr(models[1], "forward", forward)
    ensemble = Ensemble(models, "prob", V)
    with pytest.raises(XtokenError, match=r"keeps no cache.*use_cache=False"):
        ensemble.generate(torch.tensor([[0, 5]]), max_new_tokens=3, do_sample=False)
    written = ensemble.generate(torch.tensor([[0, 5]]), max_new_tokens=3, do_sample=False, use_cache=False)
    assert 3 <= written.shape[1] <= 5


def test_an_ensemble_is_not_saved(students: list[str], tmp_path: Path) -> None:
    with pytest.raises(XtokenError, match="save its models"):
        Ensemble(load(students)).save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_the_weights_of_the_models_stay(students: list[str]) -> None:
    models = load(students)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    ensemble = Ensemble(models)
    ensemble.tie_weights()
    assert ensemble.vocabulary == V + 8  # the narrowest head
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_other_tokenizers_are_refused_by_name(students: list[str], student_info: Any) -> None:
    config = EvalConfig(model=students, combine="prob", text="given", max_tokens=32, device="cpu")
    other = student_info.model_copy(update={"hash": "b" * 64})
    with pytest.raises(XtokenError, match=r"student-3 and .*student-4 have different tokenizers.*--combine bytes"):
        evaluate(config, student_info, SAMPLES, Silent(), others=[other])
    bare = student_info.model_copy(update={"adds_bos": False, "eos_id": None})
    with pytest.raises(XtokenError, match=r"student-3 and .*student-4 do not begin a text alike"):
        evaluate(config, student_info, SAMPLES, Silent(), others=[bare])
    tasks = EvalConfig(model=students, combine="prob", tasks=["arc_easy"], device="cpu")
    apart = student_info.model_copy(update={"adds_bos": False})
    with pytest.raises(XtokenError, match=r"student-3 is shown token 0 .*student-4 1"):
        evaluate(tasks, student_info, [], Silent(), others=[apart])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": ["a", "b"], "text": "t"}, "2 models are named; join them by --combine"),
        ({"model": "a", "text": "t", "combine": "prob"}, "--combine prob joins several models, and one is named"),
        ({"model": ["a", "b"], "combine": "bytes", "targets": "t"}, "--combine bytes measures --text alone"),
        ({"model": ["a", "b"], "combine": "bytes", "text": "t", "tasks": ["x"]}, "--combine bytes measures --text"),
        ({"model": ["a", "b"], "combine": "bytes", "text": "t", "max_tokens": 9}, "leave --max-tokens out"),
        ({"model": ["a", "b"], "combine": "bytes", "text": "t", "out": "f"}, "no figures of single documents"),
        ({"model": "a", "targets": "t", "out": "f"}, "--out is for the documents of --text"),
        ({"model": ["a", "b"], "combine": "prob", "text": "t", "max_bytes": 9}, "--max-bytes goes with --combine"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvalConfig(**given)


@pytest.mark.engine
def test_real_models(smollm2_dir: Path) -> None:
    """SmolLM2 and a perturbed copy of it: greedy text, and the model itself where both are equal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    prompt = tokenizer("Call me Ishmael. Some years", return_tensors="pt")
    written = Ensemble([model, other], "prob", len(tokenizer)).generate(**prompt, max_new_tokens=8, do_sample=False)
    ids = prompt.input_ids[0].tolist()
    with torch.no_grad():
        for _ in range(8):
            rows = [one(torch.tensor([ids])).logits[0, -1].double().softmax(-1) for one in (model, other)]
            ids.append(int((sum(rows) / 2).argmax()))
        assert written[0].tolist() == ids
        wanted = model(prompt.input_ids).logits.log_softmax(-1)
        for combine in ("prob", "logit"):
            found = Ensemble([model, model], combine, len(tokenizer))(prompt.input_ids).logits
            torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING)
