"""A small byte-level BPE as a real tokenizer.json."""

from collections.abc import Sequence
from pathlib import Path

from xtoken.pipeline.tokens import TextTokenizer, load_tokenizer


def write_bpe(folder: Path, merges: Sequence[str], unreached: Sequence[str] = ()) -> TextTokenizer:
    """Write it and load it: GPT-2's pattern, ``<eos>`` (0) and ``<|im_end|>`` (1), the bytes, one token per merge.

    Args:
        folder: gets tokenizer.json.
        merges: pairs with a blank between, in the letters of byte-level vocabularies.
        unreached: tokens that no merges make.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    controls = ["<eos>", "<|im_end|>"]
    tokens = [*controls, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges), *unreached]
    vocab = {token: at for at, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in controls])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return load_tokenizer(str(folder))
