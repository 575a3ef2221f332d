"""TRL's GOLD trainer as it comes from PyPI, with a live teacher; in TRL's own environment, without xtoken.

    PYTHON benchmarks/lab/gold_trl.py SETTINGS.json

SETTINGS: student, teacher (folders), texts (JSON lines of prompt and completion), out, rate, steps, samples (of a
step), seed, warmup, loss (keyword arguments of GOLDConfig). Writes the trained model to OUT/model, and OUT/steps.json:
seconds of each step, versions.
"""

import itertools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Train as a file of settings says."""
    # this file's folder is searched first, and has names of its own
    sys.path.pop(0)
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(asked["out"])
    ended = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.monotonic())

    set_seed(asked["seed"])
    rows = [json.loads(line) for line in Path(asked["texts"]).read_text(encoding="utf-8").splitlines()]
    kept = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(asked["student"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = GOLDConfig(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=asked["samples"],
        gradient_accumulation_steps=1,
        max_steps=asked["steps"],
        learning_rate=asked["rate"],
        warmup_steps=asked["warmup"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
        seed=asked["seed"],
        max_length=512,
        lmbda=0.0,  # the texts that are given, no generation
        teacher_tokenizer_name_or_path=asked["teacher"],
        **asked["loss"],
    )
    trainer = GOLDTrainer(
        model=AutoModelForCausalLM.from_pretrained(asked["student"]),
        teacher_model=AutoModelForCausalLM.from_pretrained(asked["teacher"]),
        args=config,
        train_dataset=Dataset.from_list(kept),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(str(out / "model"))
    seconds = [b - a for a, b in itertools.pairwise(ended)]
    names = ("trl", "transformers", "torch", "accelerate")
    (out / "steps.json").write_text(
        json.dumps({"seconds": seconds, "versions": {name: version(name) for name in names}})
    )


if __name__ == "__main__":
    main()
