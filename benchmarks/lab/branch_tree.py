"""Branches of a text: what a teacher gives to numerals that it spells digit by digit, in few tokens.

Shapes: P places in a text, N nodes of a tree.
"""

from collections.abc import Iterator
from typing import Any

import torch

FIRST, SECOND = 0.01, 0.005  # probability of a first digit, and of two, that is followed
ENTRY = 1e-4  # least probability of a stored numeral
Numerals = dict[str, float]  # probability of each numeral of one to three digits


class Tree:
    """Branches of one text: nodes behind its cached tokens, each of which sees its own path."""

    def __init__(self, model: Any, cache: Any, length: int, digits_10: torch.Tensor) -> None:
        self.model, self.cache, self.length, self.digits_10 = model, cache, length, digits_10
        self.nodes = 0

    def numerals(self, at: list[int], first_P10: torch.Tensor) -> Iterator[Numerals]:
        """Of each place, behind token ``at``."""
        ones = [(p, d, float(first_P10[p, d])) for p in range(len(at)) for d in range(10) if first_P10[p, d] >= FIRST]
        rows = self._next([(at[p], [], d) for p, d, _ in ones])
        twos, found = [], [dict[str, float]() for _ in at]
        for node, (p, d, mass) in enumerate(ones):
            after_10 = rows[node]
            found[p][str(d)] = mass * (1 - float(after_10.sum()))
            twos += [
                (p, d, e, mass * float(after_10[e]), node) for e in range(10) if mass * float(after_10[e]) >= SECOND
            ]
        third = self._next([(at[p], [node], e) for p, _, e, _, node in twos])
        for node, (p, d, e, mass, _) in enumerate(twos):
            after_10 = third[node]
            found[p][f"{d}{e}"] = mass * (1 - float(after_10.sum()))
            for f in range(10):
                found[p][f"{d}{e}{f}"] = mass * float(after_10[f])
        for one in found:
            yield {name: mass for name, mass in one.items() if mass >= ENTRY}

    def _next(self, nodes: list[tuple[int, list[int], int]]) -> torch.Tensor:
        """P of each digit behind each node, [N, 10]; a node is a place in the text, earlier nodes, and a digit."""
        if not nodes:
            return torch.zeros(0, 10)
        cached = self.length + self.nodes
        mask = torch.full((1, 1, len(nodes), cached + len(nodes)), -torch.inf)
        for row, (place, path, _) in enumerate(nodes):
            mask[0, 0, row, : place + 1] = 0
            for node in path:
                mask[0, 0, row, self.length + node] = 0
            mask[0, 0, row, cached + row] = 0
        positions = torch.tensor([[place + 1 + len(path) for place, path, _ in nodes]])
        output = self.model(
            self.digits_10[[digit for *_, digit in nodes]][None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.nodes += len(nodes)
        probabilities: torch.Tensor = output.logits[0].float().softmax(-1)[:, self.digits_10]
        return probabilities
