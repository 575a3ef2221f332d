"""Answers by transformers: one token of each sequence at a time, drawn so that its seed alone decides.

Shapes: B sequences, T tokens of the longest prompt, U teacher vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.pipeline.teachers.base import Question
from xtoken.schemas.errors import XtokenError


def answers(model: Any, device: torch.device, questions: Sequence[Question]) -> list[NDArray[np.int32]]:
    """Answer prompts together, int32 each.

    Args:
        model: of transformers, causal.
        device: where it is.
        questions: prompts; padded on the left, positions count from their first token.

    Raises:
        XtokenError: logits that are NaN or inf.
    """
    longest = max(len(question.ids) for question in questions)
    ids_BT = torch.zeros(len(questions), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, question in enumerate(questions):
        ids_BT[row, longest - len(question.ids) :] = torch.from_numpy(question.ids.astype(np.int64))
        mask_BT[row, longest - len(question.ids) :] = 1
    random = [np.random.default_rng(question.seed) for question in questions]
    found: list[list[int]] = [[] for _ in questions]
    open_rows, cache = set(range(len(questions))), None
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    with torch.inference_mode():
        while open_rows:
            logits_BU, cache = _step(model, ids_BT, mask_BT, cache)
            for row in sorted(open_rows):
                question = questions[row]
                found[row].append(draw(logits_BU[row], question.temperature, question.top_p, random[row].random()))
                if found[row][-1] in question.stops or len(found[row]) == question.tokens:
                    open_rows.remove(row)
            ids_BT = torch.tensor([[ids[-1]] for ids in found], device=device)
            mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)
    return [np.array(ids, np.int32) for ids in found]


def _step(model: Any, ids_BT: Tensor, mask_BT: Tensor, cache: Any) -> tuple[NDArray[np.float64], Any]:
    """Logits behind the last token of each sequence, float64 [B, U], and the cache for the next step."""
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    out = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits_BU: NDArray[np.float64] = out.logits[:, -1].double().cpu().numpy()
    if not np.isfinite(logits_BU).all():
        raise XtokenError("the teacher gave logits that are NaN or inf; try --dtype float32")
    return logits_BU, out.past_key_values


def draw(logits_U: NDArray[np.float64], temperature: float, top_p: float, uniform: float) -> int:
    """The token that a uniform number from 0 to 1 chooses among the most probable ones of mass ``top_p``.

    Equal logits are in the order of their ids.
    """
    if temperature == 0:
        return int(logits_U.argmax())
    order_U = np.argsort(-logits_U, kind="stable")
    p_U = np.exp((logits_U[order_U] - logits_U[order_U[0]]) / temperature)
    running_U = np.cumsum(p_U / p_U.sum())
    kept = int(np.searchsorted(running_U, top_p)) + 1 if top_p < 1 else len(running_U)
    at = np.searchsorted(running_U[:kept], uniform * running_U[min(kept, len(running_U)) - 1], side="right")
    return int(order_U[min(int(at), kept - 1)])
