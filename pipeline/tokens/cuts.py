"""Does a text cut before a space keep its tokens? What lets the windows of a document share one tokenization.

A cut lies between a character that is no whitespace and a space. BPE merges inside of pre-tokens only, so both sides
keep their tokens where a pre-token ends at every cut whatever else the text holds. The patterns below are of that kind:
a match may begin with a space and never goes on to one, nothing looks behind, and the one look ahead, ``(?!\\S)``, sees
no difference between a space and the end of a text. Without pre-tokens the same holds where a token ends at the cut:
no merge crossed it, and merges left and right of it never compete.
"""

from collections.abc import Mapping
from typing import Any

from xtoken.pipeline.tokens.rejoin import METASPACE
from xtoken.pipeline.tokens.spec import components

_PATTERNS = frozenset(
    {
        # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2 to 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        # gpt-4o, gpt-oss
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)


def keeps_tokens(data: Mapping[str, Any]) -> bool:
    """Whether both sides of a cut where a token ends have the tokens they had; False where that is not known.

    Args:
        data: a parsed tokenizer.json.
    """
    model = data["model"]
    if "merges" not in model or model.get("type", "BPE") != "BPE":
        return False
    if not all(_is_local(part) for part in components(data.get("normalizer"))):
        return False
    at_cuts = [_ends_at_cuts(part) for part in components(data.get("pre_tokenizer"))]
    # a model that looks up whole pre-tokens before it merges must have them end at the cut
    return None not in at_cuts and (True in at_cuts or not model.get("ignore_merges"))


def _is_local(part: Mapping[str, Any]) -> bool:
    """Whether a normaliser treats both sides of a cut as it treats the whole."""
    if part["type"] == "Replace":
        return part.get("pattern") == {"String": " "} and part.get("content") == METASPACE
    return bool(part["type"] == "NFC")


def _ends_at_cuts(part: Mapping[str, Any]) -> bool | None:
    """Whether a pre-tokenizer ends a pre-token at every cut; None for one that may see across it."""
    if part["type"] == "Digits":
        return False
    if part["type"] == "ByteLevel":
        return None if part.get("add_prefix_space", True) else bool(part.get("use_regex", True))
    if part["type"] != "Split":
        return None
    if part["pattern"] == {"String": " "}:
        return False
    way = (part["behavior"], part["invert"])
    known = part["pattern"].get("Regex") in _PATTERNS and way in (("Isolated", False), ("Removed", True))
    return True if known else None
