"""Several models as one: over the tokens of one tokenizer, or over bytes whatever their tokenizers are."""

from xtoken.trainer.ensemble.tokens import Ensemble

__all__ = ["Ensemble"]
