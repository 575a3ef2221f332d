"""A model whose vocabulary is exchanged: its matrices by token, and its settings that name tokens.

Shapes: R old rows, N new rows, H width.
"""

import inspect
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.student.expansion import is_expanded
from xtoken.trainer.student.model import load_student, refuse_packed

# Settings of generation that name ids of the old tokenizer.
_OLD_IDS = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id"),
)


@dataclass
class OldModel:
    """A causal language model, as its files hold it, on the CPU.

    Attributes:
        model: itself; ``fit`` gives it new rows.
        source: where it is from.
        tied: whether its head is its embedding.
    """

    model: Any
    source: str
    tied: bool

    @property
    def rows(self) -> int:
        """R: ids that both matrices have."""
        return min(len(self.embedding_RH), len(self.head_RH))

    @property
    def embedding_RH(self) -> Tensor:
        """The embedding's matrix."""
        weight: Tensor = self.model.get_input_embeddings().weight.data
        return weight

    @property
    def head_RH(self) -> Tensor:
        """The head's matrix: the same one where they are tied."""
        weight: Tensor = self.model.get_output_embeddings().weight.data
        return weight

    @property
    def bias_R(self) -> Tensor | None:
        """The head's bias, if it has one."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        return None if bias is None else bias.data

    @property
    def ends(self) -> set[int]:
        """Old ids at which the model stops."""
        said = [getattr(part, "eos_token_id", None) for part in (self.model.generation_config, self.model.config)]
        return {one for ids in said for one in (ids if isinstance(ids, list) else [ids]) if isinstance(one, int)}

    def inputs_of(self, ids: Sequence[int]) -> Tensor:
        """What the embedding gives for some ids, its own scale included, [U, H].

        Raises:
            XtokenError: the model takes nothing but ids, so nothing can be added to what they give.
        """
        if "inputs_embeds" not in inspect.signature(self.model.forward).parameters:
            raise XtokenError(f"{type(self.model).__name__} takes no inputs_embeds; leave --expand-inputs out")
        with torch.no_grad():
            found: Tensor = self.model.get_input_embeddings()(torch.tensor(ids))
        return found

    def untie(self) -> None:
        """Give the head a matrix of its own, so that the next save holds both.

        Raises:
            XtokenError: its code ties them whatever its configuration says.
        """
        for part in _parts(self.model):
            part.tie_word_embeddings = False
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            again = type(self.model)(deepcopy(self.model.config))
        if again.get_output_embeddings().weight is again.get_input_embeddings().weight:
            raise XtokenError(
                f"{type(self.model).__name__} ties its head to its embedding whatever its config.json says, and a "
                "model of bytes needs both; give a model of another architecture"
            )
        head = self.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        self.tied = False

    def resize(self, rows: int) -> None:
        """Matrices of ``rows`` rows, whatever is in them.

        Raises:
            XtokenError: transformers cannot.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                self.model.resize_token_embeddings(rows, mean_resizing=False)
        except Exception as error:  # what an architecture raises that resizes otherwise, or not at all
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise XtokenError(f"transformers cannot give {self.source} {rows:,} rows ({reason})") from error

    def fill(self, embedding_NH: Tensor, head_NH: Tensor | None, bias_N: Tensor | None) -> None:
        """Put new rows into matrices of that size."""
        self.embedding_RH.copy_(embedding_NH)
        if head_NH is not None:
            self.head_RH.copy_(head_NH)
        if self.bias_R is not None and bias_N is not None:
            self.bias_R.copy_(bias_N)

    def name_tokens(self, info: TokenizerInfo, pad: int | None, ends: Sequence[int], never: Sequence[int]) -> None:
        """Let config and generation config name the new tokens.

        Args:
            info: the new tokenizer.
            pad: its padding token.
            ends: at which generation stops.
            never: ids that are not to be generated.
        """
        generation = self.model.generation_config
        for part in (*_parts(self.model), generation):
            part.bos_token_id, part.eos_token_id, part.pad_token_id = info.bos_id, info.eos_id, pad
            if getattr(part, "unk_token_id", None) is not None:
                part.unk_token_id = None  # nothing reads it but tokenizers without one of their own
        for name in _OLD_IDS:
            if getattr(generation, name, None) is not None:
                setattr(generation, name, None)
        generation._from_model_config = False  # else transformers makes it anew, without the lists
        generation.eos_token_id = list(ends) if len(ends) > 1 else next(iter(ends), None)
        generation.suppress_tokens = list(never) or None
        self.model.get_input_embeddings().padding_idx = None


def _parts(model: Any) -> Collection[Any]:
    """The configuration, and its part for text where that is another."""
    return {id(part): part for part in (model.config, model.config.get_text_config())}.values()


def open_old_model(source: str, trust_remote_code: bool) -> OldModel:
    """Load a model in the dtype of its files and see that all it has by token are an embedding and a head.

    Raises:
        XtokenError: it cannot be loaded, is quantised, has expanded inputs, or has more, or less.
    """
    if is_expanded(source):
        raise XtokenError(
            f"{source} has expanded inputs, which read its ids as bytes and would read those of other tokens so, too; "
            "give the model that it was made from"
        )
    model = load_student(source, torch.device("cpu"), trust_remote_code, dtype="auto")
    refuse_packed(model, source)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, torch.nn.Embedding):
        raise XtokenError(f"{source} has no input embedding by token ({type(embedding).__name__}); give another model")
    if not isinstance(head, torch.nn.Linear):
        raise XtokenError(f"{source} has no linear output head ({type(head).__name__}); give a causal language model")
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.nn.Embedding)
            and module is not embedding
            and len(module.weight) == len(embedding.weight)
        ):
            raise XtokenError(
                f"{source} has a second table by token, {name}, for which nobody knows what a new token's row is; give "
                "a model of another architecture"
            )
    return OldModel(model, source, head.weight is embedding.weight)
