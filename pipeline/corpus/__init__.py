"""Stage 1: documents with stable ids, and windows of them."""

from xtoken.pipeline.corpus.corpus import Corpus, Document
from xtoken.pipeline.corpus.listing import CorpusFile, Listing
from xtoken.pipeline.corpus.windows import Window, all_windows, windows

__all__ = ["Corpus", "CorpusFile", "Document", "Listing", "Window", "all_windows", "windows"]
