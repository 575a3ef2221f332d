"""Stage 2: a tokenizer as bytes. Token table, ids and byte ends of a text."""

from xtoken.pipeline.tokens.interface import Encoded, TextTokenizer
from xtoken.pipeline.tokens.load import load_tokenizer, refuse_long_prefix
from xtoken.pipeline.tokens.table import TokenTable

__all__ = ["Encoded", "TextTokenizer", "TokenTable", "load_tokenizer", "refuse_long_prefix"]
