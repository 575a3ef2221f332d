"""Stage 2: a tokenizer as bytes. Token table, ids and byte ends of a text."""

from pipeline.tokens.interface import Encoded, TextTokenizer
from pipeline.tokens.load import load_tokenizer, refuse_long_prefix
from pipeline.tokens.table import TokenTable

__all__ = ["Encoded", "TextTokenizer", "TokenTable", "load_tokenizer", "refuse_long_prefix"]
