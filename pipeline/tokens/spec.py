"""What tokenizer.json says, as far as token bytes depend on it; what is damaged is named by its entry."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from xtoken.pipeline.tokens.added import Added
from xtoken.pipeline.tokens.table import Kind
from xtoken.schemas.errors import XtokenError

_SUPPORTED = "supported are byte-level BPE, metaspace BPE or Unigram with byte fallback, and 'bytes'"
_PARTS = ("normalizers", "pretokenizers", "decoders")
# A vocabulary has few holes: an id far beyond its tokens is damage, and would take memory for all ids below it.
_HOLES = 1 << 20
_UNSPELLABLE = "\ufdd0{}\ufdd0"  # noncharacters, which text does not hold


@dataclass(frozen=True)
class Spec:
    """What tokenizer.json says, as far as token bytes depend on it."""

    kind: Kind
    vocab: dict[str, int]  # token -> id, added tokens included
    model_vocab: dict[str, int]
    added: dict[str, bool]  # added token -> special
    added_ids: dict[int, Added]
    merges: list[tuple[str, str]]
    unk_token: str | None
    normalizer: Mapping[str, Any] | None

    @cached_property
    def names(self) -> dict[int, str]:
        """Token of every id that has one."""
        return {token_id: token for token, token_id in self.vocab.items()}


def read_spec(data: Mapping[str, Any], name: str) -> Spec:
    """Pick what is needed from a parsed tokenizer.json.

    Raises:
        XtokenError: the file is not a tokenizer.json, an entry of it is damaged, or it is of a family whose tokens have
            no exact bytes.
    """
    model = data.get("model")
    if not isinstance(model, Mapping) or "vocab" not in model:
        raise XtokenError(f"tokenizer {name!r}: the file has no model with a vocabulary; give a tokenizer.json")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_component(data.get(part), part, name)
    kind = _kind(data, model, name)
    model_vocab = _model_vocab(model, name)
    added = _added_tokens(data.get("added_tokens"), name)
    vocab = {**model_vocab, **{token["content"]: token["id"] for token in added}}
    _check_ids(vocab, name)
    return Spec(
        kind=kind,
        vocab=vocab,
        model_vocab=model_vocab,
        added={token["content"]: token["special"] for token in added},
        added_ids=_added_ids(added, data.get("normalizer")),
        merges=_merges(model.get("merges"), name),
        unk_token=_unk_token(model, name),
        normalizer=data.get("normalizer"),
    )


def components(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A component, or the members of a Sequence of them, at any depth."""
    if component is None:
        return
    members = [component[key] for key in _PARTS if key in component]
    if component.get("type") == "Sequence" and members:
        for member in members[0]:
            yield from components(member)
    else:
        yield component


def _damaged(name: str, entry: str, value: object, rule: str) -> NoReturn:
    raise XtokenError(
        f"tokenizer {name!r}: {entry} of tokenizer.json is {str(value)[:80]!r}, but {rule}; the file is damaged or was "
        "edited by hand: fetch it again"
    )


def _check_component(component: Any, entry: str, name: str) -> None:
    if component is None:
        return
    if not isinstance(component, Mapping) or not isinstance(component.get("type"), str):
        _damaged(name, f"the entry {entry!r}", component, 'it must be an object with a "type", or null')
    for key in _PARTS:
        members = component.get(key, [])
        if not isinstance(members, list):
            _damaged(name, f"the entry {key!r} of {entry!r}", members, "it must be a list")
        for at, member in enumerate(members):
            _check_component(member, f"{entry}.{key}[{at}]", name)


def _kind(data: Mapping[str, Any], model: Mapping[str, Any], name: str) -> Kind:
    model_type = model.get("type") or ("BPE" if "merges" in model else "unknown")
    parts = {part["type"] for part in components(data.get("decoder"))} | {
        part["type"] for part in components(data.get("pre_tokenizer"))
    }
    if model_type == "BPE" and ("ByteLevel" in parts or _normalises_to_bytes(data)):
        return "byte-level"
    if model_type in ("BPE", "Unigram") and model.get("byte_fallback"):
        return "metaspace"
    raise XtokenError(
        f"tokenizer {name!r} is {model_type}{'' if model.get('byte_fallback') else ' without byte fallback'}, "
        f"whose tokens cannot be joined back to the bytes of a text; {_SUPPORTED}"
    )


def _normalises_to_bytes(data: Mapping[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in components(data.get("normalizer")))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _model_vocab(model: Mapping[str, Any], name: str) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, Mapping):
        for token, token_id in vocab.items():
            if not _is_id(token_id):
                _damaged(name, f"the id of {token!r} in the vocabulary", token_id, "an id is a whole number from 0 on")
        return dict(vocab)
    if not isinstance(vocab, list):
        _damaged(name, "the vocabulary", vocab, "it must be an object, or a list of tokens with scores")
    for at, entry in enumerate(vocab):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            _damaged(name, f"entry {at} of the vocabulary", entry, "it must be a token with its score")
    return {token: token_id for token_id, (token, _) in enumerate(vocab)}


def _added_tokens(tokens: Any, name: str) -> list[Mapping[str, Any]]:
    if tokens is None:
        return []
    if not isinstance(tokens, list):
        _damaged(name, "the entry 'added_tokens'", tokens, "it must be a list")
    for at, token in enumerate(tokens):
        entry = f"added token {at}"
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str) or not token["content"]:
            _damaged(name, entry, token, 'it must be an object with a "content"')
        if not _is_id(token.get("id")):
            _damaged(name, f"{entry}, {token['content']!r},", dict(token), 'its "id" must be a whole number from 0 on')
        if not isinstance(token.get("special"), bool):
            _damaged(name, f"{entry}, {token['content']!r},", dict(token), 'its "special" must be true or false')
    return tokens


def _added_ids(tokens: Sequence[Mapping[str, Any]], normalizer: Mapping[str, Any] | None) -> dict[int, Added]:
    """What each added token looks like in a text; those marked normalized are looked for in the normalised one."""
    parts = list(components(normalizer))
    replaced = any(part["type"] == "Replace" and part.get("pattern") == {"String": " "} for part in parts)
    prepended = any(part["type"] == "Prepend" for part in parts)
    added = {}
    for token in tokens:
        normal = bool(token.get("normalized"))
        blanks = {"spared": normal and replaced, "own_blank": normal and prepended}
        added[token["id"]] = Added(token["content"], bool(token.get("rstrip")), **blanks)
    return added


def _check_ids(vocab: Mapping[str, int], name: str) -> None:
    """No id far beyond the number of tokens."""
    if not vocab:
        _damaged(name, "the vocabulary", "empty", "it must hold tokens")
    token, highest = max(vocab.items(), key=lambda item: item[1])
    if highest > len(vocab) + _HOLES:
        rule = f"no id may lie more than {_HOLES:,} beyond the {len(vocab):,} tokens there are"
        _damaged(name, f"the id of {token!r}", highest, rule)


def _merges(merges: Any, name: str) -> list[tuple[str, str]]:
    if not isinstance(merges, list | None):
        _damaged(name, "the entry 'merges'", merges, "it must be a list")
    pairs = []
    for at, merge in enumerate(merges or []):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) and one for one in pair)):
            _damaged(name, f"merge {at}", merge, "a merge is two tokens, as a list or with one blank between them")
        pairs.append((pair[0], pair[1]))
    return pairs


def _unk_token(model: Mapping[str, Any], name: str) -> str | None:
    if model.get("unk_token") is not None:
        return str(model["unk_token"])
    unk_id = model.get("unk_id")
    if unk_id is None:
        return None
    if not _is_id(unk_id) or not isinstance(model["vocab"], list) or unk_id >= len(model["vocab"]):
        _damaged(name, "the entry 'unk_id'", unk_id, "it must be a place in the list of tokens")
    return str(model["vocab"][unk_id][0])


def without_control_tokens(data: Mapping[str, Any], spec: Spec, control: frozenset[str]) -> dict[str, Any] | None:
    """tokenizer.json of a Unigram model whose control tokens are not found in text; None where nothing need change.

    Such a model holds <s> and </s> in its own vocabulary, where they match text with the best of scores. Their places
    keep their ids under names that no text holds, and are no longer added tokens, whose ids would move.
    """
    model = data["model"]
    inside = control & spec.model_vocab.keys()
    if isinstance(model["vocab"], Mapping) or not inside:
        return None
    vocab = [
        [_UNSPELLABLE.format(at) if token in inside else token, score]
        for at, (token, score) in enumerate(model["vocab"])
    ]
    added = [token for token in data.get("added_tokens") or [] if token["content"] not in inside]
    return {**data, "model": {**model, "vocab": vocab}, "added_tokens": added}
