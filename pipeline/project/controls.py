"""Control tokens of two tokenizers: which do the same, and a chat template written in the other's tokens."""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from xtoken.pipeline.project.build import SHARED_ROLES

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TextTokenizer

_ROLES = (*SHARED_ROLES, "unk")
_VARIABLES = ("bos", "eos", "pad", "unk")  # bos_token, ...: what transformers gives a template beside the messages
_TURNS = ("user", "assistant", "user", "assistant")
_SAID = "zyqx{}qxyz"  # what is said in a turn: no template and no token holds it
Marks = dict[str, int]


def control_pairs(
    new: "TextTokenizer", old: "TextTokenizer", new_template: str | None, old_template: str | None
) -> dict[int, int]:
    """New id -> old id of the control tokens that do the same: by role, then by name, then by place in a template.

    Args:
        new, old: the two tokenizers.
        new_template, old_template: their chat templates (Jinja), where they have one.
    """
    pairs: dict[int, int] = {}
    for role in _ROLES:
        _pair(pairs, new.table.id_of(role), _of_role(old, role))
    named = {name: token for token, name in sorted(old.controls.items(), reverse=True)}
    for token, name in new.controls.items():
        _pair(pairs, token, named.get(name))
    theirs, ours = turn_marks(new, new_template), turn_marks(old, old_template)
    for mark, token in theirs.items():
        _pair(pairs, token, ours.get(mark))
    return pairs


def _pair(pairs: dict[int, int], new: int | None, old: int | None) -> None:
    if new is not None and old is not None:
        pairs.setdefault(new, old)


def _of_role(tokenizer: "TextTokenizer", role: str) -> int | None:
    """A token by role; BOS may be one that has another role too (it is EOS as well)."""
    found = tokenizer.table.id_of(role)
    return tokenizer.table.info.bos_id if role == "bos" and found is None else found


def turn_marks(tokenizer: "TextTokenizer", template: str | None) -> Marks:
    """The control tokens that begin and end the turns of a chat: ``open user``, ``close assistant`` and so on.

    Of what a template writes between two turns, the first control token ends the one and the second begins the other.
    Where that tells nothing, the end-of-turn token by role ends both.
    """
    eot = tokenizer.table.id_of("eot")
    marks: Marks = {} if eot is None else {f"close {role}": eot for role in _TURNS}
    ids = {name: token for token, name in tokenizer.controls.items()}
    pattern = _any_of(ids)
    for before, after, between in _between_turns(tokenizer, template):
        found = [ids[name] for name in pattern.findall(between)]
        if len(found) > 1:
            marks |= {f"close {before}": found[0], f"open {after}": found[1]}
    return marks


def _any_of(names: Mapping[str, Any]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _between_turns(tokenizer: "TextTokenizer", template: str | None) -> Iterator[tuple[str, str, str]]:
    """Role before, role after, and the text that the template puts between what they say."""
    rendered = None if template is None else _rendered(tokenizer, template)
    if rendered is None:
        return
    for at, (before, after) in enumerate(pairwise(_TURNS)):
        _, found, rest = rendered.partition(_SAID.format(at))
        between, found_next, _ = rest.partition(_SAID.format(at + 1))
        if found and found_next:
            yield before, after, between


def _rendered(tokenizer: "TextTokenizer", template: str) -> str | None:
    """A chat of four turns; None for a template that fails on it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": role, "content": _SAID.format(at)} for at, role in enumerate(_TURNS)]
    tokens: dict[str, Any] = {f"{role}_token": _name(tokenizer, role) or "" for role in _VARIABLES}
    try:
        made: Any = render_jinja_template(conversations=[chat], chat_template=template, **tokens)
    except Exception:  # what a template raises is up to its author; it then tells nothing about turns
        return None
    return str((made[0] if isinstance(made, tuple) else made)[0])


def _name(tokenizer: "TextTokenizer", role: str) -> str | None:
    token = _of_role(tokenizer, role)
    return None if token is None else tokenizer.controls.get(token)


def translated(
    template: str, old: "TextTokenizer", new: "TextTokenizer", new_template: str | None, pairs: Mapping[int, int]
) -> str | None:
    """A model's chat template in the new tokenizer's control tokens; None where that lacks one of them.

    Args:
        template: the model's.
        old, new: the two tokenizers.
        new_template: the new tokenizer's own, which tells what its control tokens do.
        pairs: see ``control_pairs``.
    """
    variables = [role for role in _VARIABLES if re.search(rf"\b{role}_token\b", template)]
    if any(_of_role(new, role) is None for role in variables if _of_role(old, role) is not None):
        return None
    name_of = {name: token for token, name in old.controls.items()}
    pattern = _any_of(name_of)
    used = {name: name_of[name] for name in pattern.findall(template)}
    ours, theirs = turn_marks(old, template), turn_marks(new, new_template)
    names = {name: _counterpart(token, ours, theirs, new, pairs, name) for name, token in used.items()}
    if None in names.values() or len(set(names.values())) < len(names):
        return None
    return pattern.sub(lambda match: str(names[match[0]]), template)


def _counterpart(
    token: int, ours: Marks, theirs: Marks, new: "TextTokenizer", pairs: Mapping[int, int], name: str
) -> str | None:
    """How the new tokenizer spells an old control token: by its name, its place in a chat, or its role."""
    if name in new.controls.values():
        return name
    marks = [theirs[mark] for mark, one in ours.items() if one == token and mark in theirs]
    found = [*marks, *sorted(one for one, of in pairs.items() if of == token)]
    return new.controls[found[0]] if found else None
