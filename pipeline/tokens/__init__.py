"""Stage 2: a tokenizer as bytes. Token table, ids and byte ends of a text."""

from xtoken.pipeline.tokens.chat import ChatTokenizer
from xtoken.pipeline.tokens.hf_tokenizer import CANARY
from xtoken.pipeline.tokens.interface import Encoded, TextTokenizer
from xtoken.pipeline.tokens.load import load_chat_tokenizer, load_tokenizer, refuse_long_prefix
from xtoken.pipeline.tokens.table import TokenTable

__all__ = [
    "CANARY",
    "ChatTokenizer",
    "Encoded",
    "TextTokenizer",
    "TokenTable",
    "load_chat_tokenizer",
    "load_tokenizer",
    "refuse_long_prefix",
]
