"""A loop on Accelerate that learns from stored targets, several batches to a step.

python examples/loops/accelerate_loop.py TARGETS STUDENT OUT        # or: accelerate launch ...
"""

import sys
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import xtoken


def train(targets: str, student: str, out: str, steps: int = 20, accumulate: int = 2) -> list[float]:
    """The loss of each step, in nats."""
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0))
    dataset = xtoken.targets_dataset(targets, loss="p-kl", pack=True)  # each rank reads its share: not prepared
    losses = []
    for epoch in range(steps):  # at most
        dataset.set_epoch(epoch)
        batches = iter(DataLoader(dataset, batch_size=4, collate_fn=dataset.collate))
        while len(losses) < steps and (several := list(islice(batches, accumulate))):
            held, loss = [batch.pop("targets") for batch in several], 0.0
            for batch, one in zip(several, held, strict=True):
                logits = model(**send_to_device(batch, accelerator.device)).logits
                found = xtoken.distillation_loss(logits, one, step=held)  # divided by what all of ``held`` hold
                accelerator.backward(found.loss)
                loss += found.loss.item()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
    accelerator.unwrap_model(model).save_pretrained(out)
    return losses


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in train(*sys.argv[1:4])))
