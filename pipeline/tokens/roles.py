"""Which token is BOS, EOS, end-of-turn, padding, unknown: from the files beside tokenizer.json, else by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xtoken.pipeline.tokens.spec import Spec
from xtoken.schemas.errors import XtokenError

# A token that has several of these jobs keeps the first: W maps EOS to EOS whatever else it does.
PRIORITY = ("eos", "bos", "eot", "pad", "unk")

_DECLARED = ("bos", "eos", "pad", "unk")
_KNOWN = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>"),
    "eot": (
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end|>",
        "<|eot|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|return|>",
    ),
    "pad": ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>", "[PAD]"),
    "unk": ("<unk>", "<|unk|>", "[UNK]"),
}


@dataclass(frozen=True)
class SideFiles:
    """The JSON files of a model folder that say more about its tokenizer; empty where there is none."""

    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_map: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def declared_tokens(side: SideFiles, names: Mapping[int, str]) -> dict[str, str | None]:
    """Role -> token as the side files say; None where they say that there is none.

    Args:
        side: the files, in the order in which they are believed: tokenizer_config.json,
            special_tokens_map.json, config.json.
        names: id -> token, for config.json, which names ids.
    """
    name_of_role: dict[str, str | None] = {}
    for role in _DECLARED:
        for source in (side.tokenizer_config, side.special_tokens_map):
            if role not in name_of_role and f"{role}_token" in source:
                name_of_role[role] = _content(source[f"{role}_token"])
        if role not in name_of_role and f"{role}_token_id" in side.config:
            name_of_role[role] = names.get(_one_id(side.config[f"{role}_token_id"], names))
    return name_of_role


def _content(value: Any) -> str | None:
    """A token as its text, or as the dictionary of an added token."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _one_id(value: Any, names: Mapping[int, str]) -> int:
    """The first known id where a model has several (of EOS, usually); -1 for none."""
    ids = value if isinstance(value, list) else [value]
    return next((one for one in ids if isinstance(one, int) and one in names), -1)


def refuse_missing_tokens(spec: Spec, side: SideFiles, name: str) -> None:
    """Refuse a tokenizer whose side files name tokens that tokenizer.json lacks: other tools would add them.

    Raises:
        XtokenError: the message names the token.
    """
    config = side.tokenizer_config
    listed = config.get("added_tokens_decoder")
    wanted = [(_content(token), "added_tokens_decoder") for token in (listed or {}).values()] if listed else []
    wanted += [(_content(config.get(f"{role}_token")), f"{role}_token") for role in ("bos", "eos")]
    for token, entry in wanted:
        if token and token not in spec.vocab:
            raise XtokenError(
                f"tokenizer {name!r}: {entry} of tokenizer_config.json names {token!r}, which tokenizer.json lacks: "
                "transformers would add it, and here it would be cut into pieces. Write the files again with "
                "transformers.AutoTokenizer.from_pretrained(SOURCE).save_pretrained(FOLDER), or correct the entry"
            )


def assign_roles(
    declared: Mapping[str, str | None], unk_token: str | None, specials: Mapping[str, int], others: Mapping[str, int]
) -> dict[int, str]:
    """Token id -> role, one role per token.

    Args:
        declared: role -> token, from ``declared_tokens``.
        unk_token: the unknown token of the model in tokenizer.json.
        specials: token -> id of the special tokens; well-known names are looked up here.
        others: token -> id of all tokens that may have a role if declared, special or not.
    """
    roles: dict[int, str] = {}
    for role in PRIORITY:
        if role in declared:
            token = declared[role]
            candidates = [others.get(token) if token else None]
        else:
            candidates = [specials.get(name) for name in _KNOWN[role]]
            if role == "unk":
                candidates.insert(0, others.get(unk_token) if unk_token else None)
        token_id = next((known for known in candidates if known is not None), None)
        if token_id is not None:
            roles.setdefault(token_id, role)
    for token_id in specials.values():
        roles.setdefault(token_id, "special")
    return roles
