"""The same model under another tokenizer: rows of its embedding and head for every new token."""

from xtoken.trainer.transplant.model import OldModel, open_old_model
from xtoken.trainer.transplant.run import NewVocabulary, new_model_folder, put_tokenizer, transplant, write_report

__all__ = [
    "NewVocabulary",
    "OldModel",
    "new_model_folder",
    "open_old_model",
    "put_tokenizer",
    "transplant",
    "write_report",
]
