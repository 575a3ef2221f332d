"""What ``--learn-w`` leaves: the trained weights of W, in the order of the target folder's w.parquet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xtoken.trainer.data.targets import Targets
from xtoken.trainer.losses.base import Loss
from xtoken.trainer.losses.pkl import PKL


def save_weights(losses: Sequence[Loss], folders: Sequence[Targets], root: Path) -> list[dict[str, Any]]:
    """Write ``root/w-<teacher>.npy``, float32 [N], for every loss that learned its W; returns teachers and files."""
    files = []
    for teacher, (loss, folder) in enumerate(zip(losses, folders, strict=True)):
        if isinstance(loss, PKL) and loss.parameters():
            path, learned = root / f"w-{teacher}.npy", loss.weights()
            # Rows that the model's head does not have stand last, and were not trained.
            np.save(path, np.concatenate([learned, folder.w.weight[len(learned) :]]), allow_pickle=False)
            files.append({"teacher": teacher, "file": str(path)})
    return files
