"""A BPE tokenizer with fewer merges: its first merged tokens with all their rules, base tokens and added tokens.

What the smaller one does is a prefix of what the whole one does: it merges by the same rules in the same order and
stops earlier, so that every token of the whole one is one or several of its tokens. That holds where every rule of a
kept token joins kept tokens, and is tried on a text.
"""

import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtoken.pipeline.tokens.hf_tokenizer import CANARY
from xtoken.pipeline.tokens.spec import read_spec
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.hub_files import there

if TYPE_CHECKING:
    from xtoken.pipeline.tokens.interface import TextTokenizer

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# What says again what tokenizer.json holds, in ids or merges of the whole tokenizer.
_STALE = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")


def prune_files(folder: Path, name: str, keep: int) -> list[int]:
    """Rewrite a folder of tokenizer files in place; returns the old id of each new one, ascending.

    Args:
        folder: with tokenizer.json.
        name: of the tokenizer, for messages.
        keep: merged tokens to keep, the first ones.

    Raises:
        XtokenError: see ``prune``.
    """
    data = json.loads((folder / _FILE).read_bytes())
    smaller, kept = prune(data, name, keep)
    (folder / _FILE).write_text(json.dumps(smaller, ensure_ascii=False), encoding="utf-8")
    for stale in _STALE:
        (folder / stale).unlink(missing_ok=True)
    if there(folder / _CONFIG):
        config = json.loads((folder / _CONFIG).read_bytes())
        new_id = {str(old): str(new) for new, old in enumerate(kept)}
        listed = config.get("added_tokens_decoder") or {}
        config["added_tokens_decoder"] = {new_id[old]: token for old, token in listed.items() if old in new_id}
        (folder / _CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return kept


def prune(data: Mapping[str, Any], name: str, keep: int) -> tuple[dict[str, Any], list[int]]:
    """A parsed tokenizer.json with its first ``keep`` merged tokens, ids renumbered in order, and their old ids.

    Raises:
        XtokenError: it has no merges, or uses ``ignore_merges``, or has fewer merged tokens, or a rule of a kept token
            joins one that is not kept.
    """
    spec, model = read_spec(data, name), data["model"]
    _refuse_other_models(model, name, keep)
    made = dict.fromkeys(left + right for left, right in spec.merges if left + right in spec.model_vocab)
    if keep >= len(made):
        raise XtokenError(
            f"--keep-merges {keep}: tokenizer {name!r} has {len(made):,} merged tokens, so nothing would be left out; "
            "give a smaller number"
        )
    first = set(list(made)[:keep])
    names = {token for token in spec.vocab if token not in made or token in first or token in spec.added}
    rules = [pair for pair in spec.merges if pair[0] + pair[1] in first]
    _refuse_half_rules(rules, names, name, keep)
    kept = sorted(spec.vocab[token] for token in names)
    new_id = {old: new for new, old in enumerate(kept)}
    vocab = {token: new_id[old] for token, old in model["vocab"].items() if token in names}
    added = [{**token, "id": new_id[token["id"]]} for token in data.get("added_tokens") or []]
    return {
        **data,
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _renumbered(data.get("post_processor"), new_id),
        "model": {**model, "vocab": vocab, "merges": [list(pair) for pair in rules]},
    }, kept


def _refuse_other_models(model: Mapping[str, Any], name: str, keep: int) -> None:
    if not model.get("merges"):
        raise XtokenError(
            f"--keep-merges {keep}: tokenizer {name!r} is {model.get('type', 'a model')} without merges, and only BPE "
            "can be cut after a merge; give --tokenizer instead"
        )
    if model.get("ignore_merges"):
        raise XtokenError(
            f"--keep-merges {keep}: tokenizer {name!r} has ignore_merges: it takes a word that is a token whole, "
            "whatever its merges are, so fewer merges would not be a prefix of it; give --tokenizer instead"
        )


def _refuse_half_rules(rules: Iterable[tuple[str, str]], names: set[str], name: str, keep: int) -> None:
    for left, right in rules:
        missing = next((half for half in (left, right) if half not in names), None)
        if missing is not None:
            raise XtokenError(
                f"--keep-merges {keep}: tokenizer {name!r} makes {left + right!r} of {left!r} and {right!r}, and "
                f"{missing!r} is not among its first {keep:,} merged tokens; give another number, or --tokenizer"
            )


def _renumbered(part: Any, new_id: Mapping[int, int]) -> Any:
    """A post-processor with the ids of its tokens renumbered: ``ids`` of a template, [token, id] of sep and cls."""
    if isinstance(part, list):
        return [_renumbered(one, new_id) for one in part]
    if not isinstance(part, Mapping):
        return part
    changed = {key: _renumbered(value, new_id) for key, value in part.items()}
    if isinstance(part.get("ids"), list):
        changed["ids"] = [new_id[one] for one in part["ids"]]
    for key in ("sep", "cls"):
        if isinstance(part.get(key), list):
            changed[key] = [part[key][0], new_id[part[key][1]]]
    return changed


def sample_texts() -> list[str]:
    """Text of several scripts, and English with code: what a smaller tokenizer is tried on."""
    return [CANARY, inspect.getsource(inspect)]


def check_refines(smaller: "TextTokenizer", whole: "TextTokenizer", texts: Iterable[str]) -> int:
    """Check that each token of the whole tokenizer is one or several of the smaller one; returns the bytes compared.

    Raises:
        XtokenError: a token of the whole one ends where none of the smaller one does; or there is no text.
    """
    size = 0
    for text in texts:
        ends = {int(end) for end in smaller.encode(text, complete=False, keep_text=True).ends}
        theirs = [int(end) for end in whole.encode(text, complete=False, keep_text=True).ends]
        wrong = next((end for end in theirs if end not in ends), None)
        if wrong is not None:
            shown = text.encode()[max(0, wrong - 20) : wrong + 10]
            raise XtokenError(
                f"the smaller tokenizer joins what {whole.table.info.name!r} keeps apart, at byte {wrong} of a text, "
                f"near {shown!r}: its tokens are no refinement. Give another --keep-merges, or --tokenizer"
            )
        size += len(text.encode())
    if not size:
        raise XtokenError("there is no text to compare the smaller tokenizer on; give another --text, or leave it out")
    return size
