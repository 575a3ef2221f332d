"""A model of bytes whose inputs also carry the tokens that it had before (ALM, arXiv 2503.20083).

    x_i = E_byte[b_i] + E_sub[the longest old token that ends at byte i]

E_sub is the old embedding, frozen; where no old token ends it adds nothing. Which one ends at byte i follows from the
bytes of the sample alone: a control token begins anew, and so does position 0.

transformers has no such model. The folder of one names a type of ours in config.json, which others refuse, and holds
``expansion.safetensors`` beside the weights.

Shapes: B rows, L inputs of a row, U old tokens of text, H width of the embedding.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xtoken.schemas.errors import XtokenError

FILE = "expansion.safetensors"
TYPE = "xtoken_expanded_bytes"  # in config.json; INNER names the architecture
INNER = "inner_model_type"
_CONFIG = "config.json"
_BYTES = 256


class Endings:
    """Finds the longest of some byte strings that ends at each byte of a text (Aho and Corasick, 1975)."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        # a node is a prefix of a token; 0 is the empty one. Edges are keyed node * 256 + byte.
        self._edges: dict[int, int] = {}
        parents, own = [0], [-1]
        for token, data in enumerate(tokens):
            node = 0
            for byte in data:
                key = node * _BYTES + byte
                if key not in self._edges:
                    self._edges[key] = len(own)
                    parents.append(key)
                    own.append(-1)
                node = self._edges[key]
            own[node] = token
        self._shorter, self._token = self._link(parents, own)

    def _link(self, parents: list[int], own: list[int]) -> tuple[list[int], list[int]]:
        """Of each node: its longest suffix that is a node, and the longest token that is a suffix of it."""
        depth = [0] * len(own)
        for node in range(1, len(own)):
            depth[node] = depth[parents[node] // _BYTES] + 1
        shorter, token = [0] * len(own), list(own)
        for node in sorted(range(1, len(own)), key=depth.__getitem__):
            parent, byte = divmod(parents[node], _BYTES)
            if parent:
                shorter[node] = self._next(shorter[parent], byte, shorter)
            if token[node] < 0:
                token[node] = token[shorter[node]]
        return shorter, token

    def _next(self, node: int, byte: int, shorter: Sequence[int]) -> int:
        edges = self._edges
        while (found := edges.get(node * _BYTES + byte)) is None and node:
            node = shorter[node]
        return found or 0

    def read(self, ids: Sequence[int], fresh: Sequence[bool], node: int = 0) -> tuple[list[int], int]:
        """The longest token that ends at each id, -1 where none does, and the node to go on from.

        Args:
            ids: bytes; from 256 on control tokens.
            fresh: whether each is the first of a text.
            node: where the text before stands.
        """
        found = []
        for one, first in zip(ids, fresh, strict=True):
            if one >= _BYTES:
                node = 0
                found.append(-1)
                continue
            node = self._next(0 if first else node, one, self._shorter)
            found.append(self._token[node])
        return found, node


class ExpandedModel(torch.nn.Module):
    """A causal language model over bytes with E_sub beside its embedding; what it lacks here it has from ``inner``.

    Args:
        inner: the model, of bytes and control tokens.
        tokens: bytes of the old tokens.
        rows_UH: E_sub, as the old embedding gave it.
    """

    def __init__(self, inner: Any, tokens: Sequence[bytes], rows_UH: Tensor) -> None:
        super().__init__()
        self.inner, self.tokens = inner, list(tokens)
        # one row more, of zeros: what -1 stands for
        self.register_buffer("rows", torch.cat([rows_UH, rows_UH.new_zeros(1, rows_UH.shape[1])]), persistent=False)
        self._endings = Endings(self.tokens)
        self._nodes: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    @property
    def base_model(self) -> "_Body":
        """The model without its head."""
        return _Body(self)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, past_key_values: Any = None, **options: Any
    ) -> Any:
        """As the model's own; a cache must be one that this model made."""
        embeds_BLH, nodes = self.embed(input_ids, position_ids, past_key_values)
        options |= {} if position_ids is None else {"position_ids": position_ids}
        output = self.inner(inputs_embeds=embeds_BLH, past_key_values=past_key_values, **options)
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._nodes[cache] = nodes
        return output

    def embed(self, ids_BL: Tensor, position_BL: Tensor | None, cache: Any) -> tuple[Tensor, list[int]]:
        """x, [B, L, H], and where each row stands.

        Raises:
            XtokenError: another program filled the cache, and what its bytes were is not known.
        """
        before = 0 if cache is None else cache.get_seq_length()
        if before and cache not in self._nodes:
            raise XtokenError("this cache was not filled by a model with expanded inputs; begin without a cache")
        nodes = self._nodes[cache] if before else [0] * len(ids_BL)
        fresh = [[False] * ids_BL.shape[1]] * len(ids_BL) if position_BL is None else (position_BL == 0).tolist()
        read = [
            self._endings.read(ids, first, node) for ids, first, node in zip(ids_BL.tolist(), fresh, nodes, strict=True)
        ]
        token_BL = torch.tensor([found for found, _ in read], device=ids_BL.device).reshape(ids_BL.shape)
        rows: Tensor = self.rows
        own_BLH: Tensor = self.inner.get_input_embeddings()(ids_BL)
        return own_BLH + rows[token_BL].to(own_BLH.dtype), [node for _, node in read]

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the model, a config.json that other programs refuse, and E_sub; an empty state writes settings only."""
        folder = Path(folder)
        state = None if state_dict is None else {name.removeprefix("inner."): one for name, one in state_dict.items()}
        whole = state is None or bool(state)  # transformers empties what it is given
        self.inner.save_pretrained(folder, state_dict=state)
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        config |= {INNER: config["model_type"], "model_type": TYPE, "architectures": [type(self).__name__]}
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if whole:
            data = torch.tensor(list(b"".join(self.tokens)), dtype=torch.uint8)
            ends = torch.tensor([0, *map(len, self.tokens)]).cumsum(0)
            rows: Tensor = self.rows
            save_file({"rows": rows[:-1].detach().cpu(), "bytes": data, "ends": ends}, folder / FILE)


class _Body:
    """What ``base_model`` is asked for: states of ids, and its signature."""

    def __init__(self, whole: ExpandedModel) -> None:
        self._whole = whole

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        """Hidden states, first in what is returned."""
        embeds_BLH, _ = self._whole.embed(input_ids, position_ids, None)
        options |= {} if position_ids is None else {"position_ids": position_ids}
        return self._whole.inner.base_model(inputs_embeds=embeds_BLH, **options)

    __call__ = forward


def is_expanded(source: str) -> bool:
    """Whether a folder holds a model with expanded inputs."""
    return (Path(source).expanduser() / FILE).is_file()


def inner_config(source: str) -> Any:
    """The settings of the model inside, as transformers has them.

    Raises:
        XtokenError: config.json does not name an architecture that transformers knows.
    """
    from transformers import AutoConfig

    try:
        settings = json.loads((Path(source).expanduser() / _CONFIG).read_text(encoding="utf-8"))
        return AutoConfig.for_model(settings.pop(INNER), **{k: v for k, v in settings.items() if k != "model_type"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise XtokenError(
            f"{source} holds {FILE}, and its {_CONFIG} is damaged ({error}); fetch the model again"
        ) from error


def expanded(inner: Any, source: str) -> ExpandedModel:
    """The model of a folder around ``inner``, which was loaded from it.

    Raises:
        XtokenError: the file is damaged, or of another model.
    """
    try:
        found = load_file(Path(source).expanduser() / FILE)
        rows_UH, data, ends = found["rows"], bytes(found["bytes"].tolist()), found["ends"].tolist()
        tokens = [data[start:stop] for start, stop in pairwise(ends)]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise XtokenError(f"{source}/{FILE} is damaged ({error}); fetch the model again") from error
    weight = inner.get_input_embeddings().weight
    whole = b"".join(tokens) == data and all(tokens) and len(tokens) == len(rows_UH)
    if not whole or rows_UH.shape[1:] != weight.shape[1:]:
        raise XtokenError(f"{source}/{FILE} is damaged or of another model; fetch the model again")
    return ExpandedModel(inner, tokens, rows_UH.to(weight.device, weight.dtype))
