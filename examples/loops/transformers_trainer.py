"""transformers' Trainer on stored targets: its loader and its loss are replaced, all else is its own.

python examples/loops/transformers_trainer.py TARGETS STUDENT OUT
"""

import sys
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import xtoken


class DistillationTrainer(Trainer):
    """``train_dataset`` is a ``xtoken.targets_dataset``."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Not prepared by Accelerate: the dataset gives each rank its share."""
        size, dataset = self.args.per_device_train_batch_size, self.train_dataset
        return DataLoader(dataset, size, collate_fn=dataset.collate)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Distillation and cross-entropy."""
        targets = inputs.pop("targets")
        outputs = model(**inputs)
        loss = xtoken.distillation_loss(outputs.logits, targets).loss
        return (loss, outputs) if return_outputs else loss


def train(targets: str, student: str, out: str, steps: int = 20) -> list[float]:
    """The loss of each step, in nats."""
    options = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    dataset = xtoken.targets_dataset(targets, loss="p-kl", pack=True)
    trainer = DistillationTrainer(model, options, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train(*sys.argv[1:4])))
