"""Models of one tokenizer as one, which the evaluators, lm-eval and ``generate`` of transformers take as any other.

Shapes: B rows, L inputs of a row, V ids of the tokenizer, N models.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import TokenizerInfo
from xtoken.trainer.student.expansion import ExpandedModel
from xtoken.trainer.student.model import head_width

Combine = Literal["prob", "logit"]


class EnsembleConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """What transformers asks of a model's configuration."""

    model_type = "xtoken_ensemble"


class EnsembleCache(Cache):
    """The models' caches side by side: what is done to all layers of one (reordering, cropping) is done to all."""

    def __init__(self, caches: Sequence[Cache], *, in_order: bool = False) -> None:
        """Of caches, one per model.

        Args:
            caches: theirs.
            in_order: a model remembers by row what it has read beside its cache, so that rows cannot change places.
        """
        super().__init__(layers=[layer for cache in caches for layer in cache.layers])
        self.caches, self.in_order = tuple(caches), in_order

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As transformers' own.

        Raises:
            XtokenError: a model has expanded inputs.
        """
        if self.in_order:
            raise XtokenError(
                "beam search lets rows change places, which a model with expanded inputs does not follow; "
                "call generate with num_beams=1"
            )
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # a LongTensor to them, which is no type


class Ensemble(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Causal language models with the ids of one tokenizer, combined at every position.

    ``prob`` is the mean of the probabilities, ``logit`` the mean of the log-probabilities, normalised again. Its logits
    are the log-probabilities of that; each model keeps a cache of its own.

        model = Ensemble([AutoModelForCausalLM.from_pretrained(name) for name in names], "prob", len(tokenizer))
        model.generate(**tokenizer("Call me", return_tensors="pt"), max_new_tokens=20)

    Whoever makes one sees to it that the models have the same tokenizer; ``xtoken eval --combine`` does.
    """

    config_class = EnsembleConfig
    supports_gradient_checkpointing = False
    # each model has been set up already: transformers asks these of whatever it sets up
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(
        self,
        models: Sequence[Any],
        combine: Combine = "prob",
        vocabulary: int | None = None,
        contexts: Sequence[int | None] = (),
    ) -> None:
        """Put loaded models together; their weights stay theirs, and settings of ``generate`` are the first one's.

        Args:
            models: two or more, on one device.
            combine: what is averaged.
            vocabulary: V: columns beyond, the padding of a head, are cut before the softmax; the narrowest head's width
                when left out.
            contexts: the token that each model was shown in front of a text. Where an input starts with the first
                model's, every other model is shown its own. All alike when left out.
        """
        widths = [head_width(model) for model in models]
        limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
        known = [limit for limit in limits if limit is not None]
        size = min([*widths, *([] if vocabulary is None else [vocabulary])])
        settings: Any = EnsembleConfig
        context = {"max_position_embeddings": min(known)} if known else {}
        super().__init__(settings(vocab_size=size, tie_word_embeddings=False, **context))
        self.models = torch.nn.ModuleList(models)
        self.combine, self.vocabulary = combine, size
        self.contexts = tuple(contexts) or (None,) * len(models)
        self.generation_config = copy.deepcopy(models[0].generation_config)
        self.takes = [set(inspect.signature(model.forward).parameters) for model in models]
        self.post_init()  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """There are none but the models', which are loaded."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Each model has tied its own."""

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuse: no class could load it."""
        raise XtokenError("an ensemble is not saved as one model; save its models, and combine them again")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """``generate`` is to make no cache: the models make theirs in the first forward pass."""
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """[B, L, V] log-probabilities (of the last ``logits_to_keep`` positions) and, with ``use_cache``, the caches.

        Raises:
            XtokenError: a cache is asked for, and a model keeps none.
        """
        caches = past_key_values.caches if past_key_values is not None else (None,) * len(self.models)
        known = past_key_values.get_seq_length() if past_key_values is not None else 0
        total, kept = None, []
        for at, model in enumerate(self.models):
            options = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
            output = model(
                input_ids=self._shown(at, input_ids, position_ids, known),
                attention_mask=attention_mask,
                past_key_values=caches[at],
                use_cache=bool(use_cache),
                **{name: value for name, value in options.items() if name in self.takes[at] and value is not None},
            )
            logits = output.logits[:, -logits_to_keep:, : self.vocabulary]
            logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
            total = logp if total is None else self._add(total, logp)
            kept.append(getattr(output, "past_key_values", None) if use_cache else None)
        assert total is not None
        in_order = any(isinstance(model, ExpandedModel) for model in self.models)
        cache = _joined(kept, in_order) if use_cache else None
        return CausalLMOutputWithPast(logits=self._mean(total), past_key_values=cache)  # type: ignore[arg-type]

    def _shown(self, at: int, input_BL: Tensor, position_BL: Tensor | None, known: int) -> Tensor:
        """The inputs of one model: its own token in front of a text."""
        first, own = self.contexts[0], self.contexts[at]
        if first == own or first is None or own is None:
            return input_BL
        if position_BL is None:
            position_BL = torch.arange(known, known + input_BL.shape[1], device=input_BL.device)[None]
        return torch.where((position_BL == 0) & (input_BL == first), own, input_BL)

    def _add(self, total: Tensor, logp: Tensor) -> Tensor:
        return torch.logaddexp(total, logp) if self.combine == "prob" else total + logp

    def _mean(self, total: Tensor) -> Tensor:
        # a mean of probabilities sums to 1 already, and normalising it takes the number of models out
        return torch.log_softmax(total if self.combine == "prob" else total / len(self.models), dim=-1)


def _joined(caches: Sequence[Any], in_order: bool) -> EnsembleCache:
    if not all(isinstance(cache, Cache) for cache in caches):
        raise XtokenError(
            "a model of the ensemble keeps no cache of keys and values; call generate with use_cache=False"
        )
    return EnsembleCache(caches, in_order=in_order)


def refuse_unequal(names: Sequence[str], tokenizers: Sequence[TokenizerInfo]) -> None:
    """Models can be combined token by token if their ids mean the same.

    Raises:
        XtokenError: two have different tokenizers; the message names both, and what works all the same.
    """
    for name, info in zip(names[1:], tokenizers[1:], strict=True):
        if info.hash != tokenizers[0].hash:
            raise XtokenError(
                f"{names[0]} and {name} have different tokenizers ({tokenizers[0].hash[:12]} and {info.hash[:12]}), so "
                "their ids do not mean the same; --combine bytes takes models of any tokenizers, and "
                "'xtoken transplant' brings a model to another's"
            )
