"""xtoken eval --tasks: a task of one's own through lm-eval, on a real model, against log-likelihoods taken by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xtoken.schemas.configs.measure import EvalConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.schemas.ui.progress import Silent
from xtoken.trainer.evaluate import evaluate

pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'xtoken[tasks]'")
pytestmark = pytest.mark.engine

# Some keys are wrong, so that no figure is 0 or 1.
QUESTIONS = [
    ("The capital of France is", ["Paris", "Berlin", "Madrid"], 0),
    ("Two plus two makes", ["nine", "four", "seventy"], 1),
    ("Water freezes into", ["ice", "glass", "wood"], 2),
    ("At night the sky is", ["green", "made of cheese and bread", "dark"], 2),
    ("A week has seven", ["days", "moons", "rivers"], 0),
    ("The opposite of hot is", ["spoon", "cold", "uphill"], 1),
    ("The first letter of the alphabet is", ["Q", "Z", "A"], 2),
]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GENERATE = """
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{words}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: tiny_group
task: [tiny_choice, tiny_again]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
INFO = TokenizerInfo(name="smollm2", hash="a" * 64, kind="byte-level", size=49152, adds_bos=False, bos_id=1, eos_id=2)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What ``datasets`` makes of the task's file does not stay with whoever runs this."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def loaded(smollm2_dir: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(smollm2_dir), AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory, loaded: tuple[Any, Any]) -> Path:
    """A folder with tasks and their questions; every third has the model's own four words as its key."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    rows: list[dict[str, Any]] = [{"question": q, "choices": choices, "answer": at} for q, choices, at in QUESTIONS]
    for i, row in enumerate(rows):
        row["words"] = "no words" if i % 3 else greedy(*loaded, row["question"])
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("tiny_choice", "tiny_again"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, data=data))
    (folder / "tiny_words.yaml").write_text(GENERATE.format(data=data, metric="exact_match"))
    (folder / "tiny_group.yaml").write_text(GROUP)
    return folder


def greedy(model: Any, tokenizer: Any, question: str) -> str:
    """Four tokens behind the question, up to the end of a line."""
    ids = tokenizer(question).input_ids
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[-4:], skip_special_tokens=True)).split("\n")[0]


def likelihoods(model: Any, tokenizer: Any, question: str, choices: list[str]) -> list[float]:
    """Log-likelihood of each choice behind the question."""
    found = []
    for choice in choices:
        start, ids = len(tokenizer(question).input_ids), tokenizer(f"{question} {choice}").input_ids
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(float(sum(logp[i - 1, ids[i]] for i in range(start, len(ids)))))
    return found


def test_tasks_of_ones_own(
    smollm2_dir: Path, loaded: tuple[Any, Any], task_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """acc and acc_norm as by hand, shots and limit heeded, groups added up, nothing printed."""
    names = ["tiny_group", "tiny_words"]
    config = EvalConfig(model=str(smollm2_dir), tasks=names, task_path=str(task_path), limit=6, device="cpu")
    capfd.readouterr()
    figures = evaluate(config, INFO, [], Silent())
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    right, normed = [], []
    for question, choices, answer in QUESTIONS[:6]:
        scores = np.array(likelihoods(*loaded, question, choices))
        right.append(int(scores.argmax()) == answer)
        normed.append(int((scores / [len(choice) for choice in choices]).argmax()) == answer)
    assert 0 < np.mean(right) < 1, "a figure that a constant would reach proves nothing"
    stderr = float(np.std(right, ddof=1) / np.sqrt(6))
    rows = {(row["task"], row["metric"]): row for row in figures["tasks"]}
    for name in ("tiny_choice", "tiny_again"):
        row = {"task": name, "metric": "acc", "value": pytest.approx(np.mean(right)), "n": 6, "shots": 0}
        assert rows[name, "acc"] == {**row, "stderr": pytest.approx(stderr)}
        assert rows[name, "acc_norm"]["value"] == pytest.approx(np.mean(normed))
    assert rows["tiny_group", "acc"]["value"] == pytest.approx(np.mean(right))
    assert rows["tiny_group", "acc"]["n"] == 12
    assert rows["tiny_words", "exact_match"]["value"] == pytest.approx(2 / 6)


def test_shots_and_the_end_of_quiet(smollm2_dir: Path, task_path: Path) -> None:
    """Examples are shown when asked for; afterwards the process logs, warns and draws bars as before."""
    import logging
    import sys

    import datasets
    import tqdm

    config = EvalConfig(
        model=str(smollm2_dir), tasks=["tiny_choice"], task_path=str(task_path), shots=2, limit=2, device="cpu"
    )
    before = (sys.stdout, tqdm.tqdm, logging.getLogger("lm_eval").level, datasets.are_progress_bars_disabled())
    rows = evaluate(config, INFO, [], Silent())["tasks"]
    assert {(row["shots"], row["n"]) for row in rows} == {(2, 2)}
    after = (sys.stdout, tqdm.tqdm, logging.getLogger("lm_eval").level, datasets.are_progress_bars_disabled())
    assert after == before
    assert sys.modules.get("evaluate", True) is not None


def test_questions_in_the_chat_template(smollm2_dir: Path, loaded: tuple[Any, Any], task_path: Path) -> None:
    """Likelihoods of the choices behind the question as a message; an example is a turn before it."""
    model, tokenizer = loaded
    names: dict[str, Any] = {"tasks": ["tiny_choice"], "task_path": str(task_path), "device": "cpu"}
    config = EvalConfig(model=str(smollm2_dir), apply_chat_template=True, **names)
    rows = {row["metric"]: row for row in evaluate(config, INFO, [], Silent())["tasks"]}
    right, without = [], []
    for question, choices, answer in QUESTIONS:
        message = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert asked.endswith("<|im_start|>assistant\n")
        scores = []
        for choice in choices:  # straight behind the answer's header: no blank comes first
            start, ids = len(tokenizer(asked).input_ids), tokenizer(asked + choice).input_ids
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(float(sum(logp[i - 1, ids[i]] for i in range(start, len(ids)))))
        right.append(int(np.argmax(scores)) == answer)
        without.append(int(np.argmax(likelihoods(model, tokenizer, question, choices))) == answer)
    assert right != without, "the template changes nothing"
    assert rows["acc"]["value"] == pytest.approx(np.mean(right))


def test_an_ensemble(smollm2_dir: Path, loaded: tuple[Any, Any], task_path: Path, tmp_path: Path) -> None:
    """Likelihoods and greedy words of averaged distributions; a small random model is the other half."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=49152, initializer_range=1.0, **sizes)).eval()
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(smollm2_dir / name, tmp_path / "other" / name)
    model, tokenizer = loaded

    def averaged(ids: torch.Tensor) -> Any:
        """With the logits of the mean of log-probabilities."""
        return type("Output", (), {"logits": sum(one(ids).logits.log_softmax(-1) for one in (model, other)) / 2})

    names = {"tasks": ["tiny_choice", "tiny_words"], "task_path": str(task_path), "limit": 6, "device": "cpu"}
    config = EvalConfig(model=[str(smollm2_dir), str(tmp_path / "other")], combine="logit", **names)
    rows = evaluate(config, INFO, [], Silent(), others=[INFO])["tasks"]
    found = {(row["task"], row["metric"]): row["value"] for row in rows}
    hits = [int(np.argmax(likelihoods(averaged, tokenizer, q, choices))) == at for q, choices, at in QUESTIONS[:6]]
    alone = [int(np.argmax(likelihoods(model, tokenizer, q, choices))) == at for q, choices, at in QUESTIONS[:6]]
    assert hits != alone, "the other model changes nothing"
    assert found["tiny_choice", "acc"] == pytest.approx(np.mean(hits))
    words = [greedy(model, tokenizer, q) if not i % 3 else "no words" for i, (q, _, _) in enumerate(QUESTIONS[:6])]
    same = [greedy(averaged, tokenizer, q) == key for (q, _, _), key in zip(QUESTIONS[:6], words, strict=True)]
    assert found["tiny_words", "exact_match"] == pytest.approx(np.mean(same))


def test_what_is_refused(smollm2_dir: Path, task_path: Path, tmp_path: Path) -> None:
    """Unknown names with near ones, data that is not there, metrics that are code from the hub, unsafe tasks."""
    (tmp_path / "away.yaml").write_text(CHOICE.format(name="tiny_away", data=tmp_path / "none.jsonl"))
    hub = GENERATE.format(data=task_path / "questions.jsonl", metric="somebody/metric")
    (tmp_path / "hub.yaml").write_text(hub.replace("tiny_words", "tiny_hub"))
    unsafe = CHOICE.format(name="tiny_unsafe", data=task_path / "questions.jsonl")
    (tmp_path / "unsafe.yaml").write_text(unsafe + "unsafe_code: true\n")
    for name, message in {
        "tiny_hubb": "task 'tiny_hubb' is unknown.*did you mean tiny_hub",
        "tiny_away": "task 'tiny_away' cannot be loaded: .*none.jsonl",
        "tiny_hub": "metric 'somebody/metric'.*--trust-remote-code",
        "tiny_unsafe": "runs the code that the model writes.*--trust-remote-code",
    }.items():
        config = EvalConfig(model=str(smollm2_dir), tasks=[name], task_path=str(tmp_path), device="cpu")
        with pytest.raises(XtokenError, match=message):
            evaluate(config, INFO, [], Silent())


def test_a_model_without_a_tokenizer(tmp_path: Path, task_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    told = EvalConfig(model=str(tmp_path), tasks=["tiny_choice"], task_path=str(task_path), device="cpu")
    with pytest.raises(XtokenError, match="--tasks needs the Hugging Face tokenizer"):
        evaluate(told, INFO.model_copy(update={"size": 32}), [], Silent())
