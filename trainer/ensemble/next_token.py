"""A causal language model as what ``Covers`` asks: the token behind ids, with a cache that several may go on from."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class NextToken:
    """Scores of one model behind its context token; ``passes`` counts forward passes."""

    def __init__(self, model: Any, context: int, size: int) -> None:
        """Of a loaded model.

        Args:
            model: in evaluation mode.
            context: the token in front of every text.
            size: ids of the tokenizer that the head has; more columns are padding.
        """
        from transformers import PreTrainedModel

        self.model, self.context, self.size, self.passes = model, context, size, 0
        # a class of another kind may keep something beside the cache, which a copy of the cache would lose
        self._copies = isinstance(model, PreTrainedModel)

    @torch.no_grad()
    def __call__(self, ids: Sequence[int], before: Any) -> tuple[NDArray[np.float64], Any]:
        """Log-probabilities [size] of the token behind ``ids``, and the model's cache.

        Args:
            ids: tokens behind the context token.
            before: the cache of all of them but the last; None reads them again.
        """
        inputs = [self.context, *ids] if before is None else [ids[-1]]
        # several tokens may be tried behind the same ones, and a model adds to the cache that it is given
        cache = copy.deepcopy(before)
        output = self.model(input_ids=self._tensor(inputs), past_key_values=cache, use_cache=self._copies)
        self.passes += 1
        kept = getattr(output, "past_key_values", None) if self._copies else None
        return self._logp(output.logits[0, -1]), kept

    @torch.no_grad()
    def nats(self, ids: Sequence[int], ends: Sequence[int] = ()) -> float:
        """-log p of these tokens, and behind them of any of ``ends``, in one forward pass."""
        logp = self._logp(self.model(input_ids=self._tensor([self.context, *ids]), use_cache=False).logits[0])
        nats = -float(logp[np.arange(len(ids)), list(ids)].sum())
        return nats - float(np.logaddexp.reduce(logp[-1, list(ends)])) if ends else nats

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=next(self.model.parameters()).device)

    def _logp(self, logits: torch.Tensor) -> NDArray[np.float64]:
        rows: NDArray[np.float64] = logits[..., : self.size].double().log_softmax(-1).cpu().numpy()
        return rows
