"""TRL's SFTTrainer on stored targets: its loader and its loss are replaced; adapters, callbacks and saving are its own.

python examples/loops/trl_sft.py TARGETS STUDENT OUT
"""

import sys
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import xtoken


class DistillationTrainer(SFTTrainer):
    """Learns from ``stored``, a ``xtoken.targets_dataset``."""

    def __init__(self, stored: xtoken.TargetsDataset, **options: Any) -> None:
        self.stored = stored
        # SFTTrainer wants a dataset of its own kind to look at; nothing is read of this one
        super().__init__(train_dataset=IterableDataset.from_generator(lambda: iter([{"text": ""}])), **options)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Not prepared by Accelerate: the dataset gives each rank its share."""
        return DataLoader(self.stored, self.args.per_device_train_batch_size, collate_fn=self.stored.collate)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Distillation and cross-entropy."""
        targets = inputs.pop("targets")
        outputs = model(**inputs)
        loss = xtoken.distillation_loss(outputs.logits, targets).loss
        return (loss, outputs) if return_outputs else loss


def train(targets: str, student: str, out: str, steps: int = 20) -> list[float]:
    """The loss of each step, in nats."""
    options = SFTConfig(
        out, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to="none", gradient_checkpointing=False, bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
    trainer = DistillationTrainer(
        xtoken.targets_dataset(targets, loss="p-kl", pack=True),
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        args=options,
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    trainer.save_model()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train(*sys.argv[1:4])))
