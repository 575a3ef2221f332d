"""Find a tokenizer's files and load them: a folder, a tokenizer.json, a hub id, or 'bytes'.

tokenizer.json is the only source of tokens: classes that rebuild a tokenizer from other files have
been seen to give other ids than the file they were built from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtoken.pipeline.tokens.byte_tokenizer import ByteTokenizer
from xtoken.pipeline.tokens.chat import ChatTokenizer, marking
from xtoken.pipeline.tokens.cuts import keeps_tokens
from xtoken.pipeline.tokens.failures import named_failures
from xtoken.pipeline.tokens.hf_table import build_table, control_names, role_candidates, special_tokens, text_normalizer
from xtoken.pipeline.tokens.hf_tokenizer import HfTokenizer
from xtoken.pipeline.tokens.interface import TextTokenizer
from xtoken.pipeline.tokens.roles import SideFiles, refuse_missing_tokens
from xtoken.pipeline.tokens.spec import Spec, read_spec, without_control_tokens
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.hub_files import commit_of, hub_file, there

_FILE = "tokenizer.json"
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_CONVERT = (
    "convert it once: transformers.AutoTokenizer.from_pretrained(SOURCE).save_pretrained(FOLDER) writes tokenizer.json"
)
_FOREIGN = ("*.gguf", "tokenizer.model", "*.model", "*.tiktoken", "tekken.json", "vocab.txt", "vocab.json")


def load_tokenizer(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> TextTokenizer:
    """Load a tokenizer and check that its tokens rejoin a canary text.

    Args:
        source: Hugging Face id, folder with tokenizer.json, path of a tokenizer.json, or ``bytes``.
        revision: revision of a hub id.
        trust_remote_code: allowed for the model; a tokenizer that is Python code is refused all the same.

    Raises:
        XtokenError: nothing is found, the file is damaged, or the tokenizer's tokens have no exact bytes.
    """
    if source == "bytes":
        return ByteTokenizer()
    files = _find(source, revision, trust_remote_code)
    return _assemble(files, read_spec(files.data, files.name))


def load_chat_tokenizer(source: str, *, revision: str | None = None) -> ChatTokenizer:
    """Load a tokenizer for conversations: template text with its added tokens, contents without any.

    Raises:
        XtokenError: as ``load_tokenizer``.
    """
    if source == "bytes":
        return ChatTokenizer.of_bytes(ByteTokenizer())
    files = _find(source, revision, False)
    spec = read_spec(files.data, files.name)
    text = _assemble(files, spec, added_as_text=True)
    with named_failures(f"tokenizer {files.name!r}: {files.path} cannot be loaded", "fetch the file again"):
        return ChatTokenizer(text, marking(files.path, spec, control_names(spec, files.side)), spec)


@dataclass(frozen=True)
class _Files:
    """What was found of a tokenizer. ``name`` goes into manifests: a model's name, not where it lies on one machine."""

    name: str
    path: Path
    data: Mapping[str, Any]
    side: SideFiles


def _find(source: str, revision: str | None, trust_remote_code: bool) -> _Files:
    local = _local_file(source)
    path = local or _hub_file(source, revision, trust_remote_code)
    data = _read_json(path)
    if local is not None:
        side = {name: _read_json(path.parent / name) for name in _SIDE_FILES if there(path.parent / name)}
    else:
        files = {name: hub_file(source, name, commit_of(path) or revision) for name in _SIDE_FILES}
        side = {name: _read_json(file) for name, file in files.items() if file is not None}
    name = source if local is None else (path.resolve().parent.name if path.name == _FILE else path.stem)
    return _Files(name, path, data, SideFiles(*(side.get(name, {}) for name in _SIDE_FILES)))


def refuse_long_prefix(tokenizer: TextTokenizer, also: str = "") -> None:
    """Refuse a tokenizer that puts several tokens in front of a text: a model is shown one before a sample.

    Args:
        tokenizer: the model's.
        also: another way out, for the message.

    Raises:
        XtokenError: it does; the message names them.
    """
    if len(tokenizer.prefix) > 1:
        named = " ".join(map(tokenizer.controls.__getitem__, tokenizer.prefix))
        raise XtokenError(
            f"tokenizer {tokenizer.table.info.name!r}: its post-processor puts {len(tokenizer.prefix)} tokens in front "
            f"of every text ({named}), but one at most, BOS, can be shown before a sample, and behind that one alone "
            "the model does not predict as it was trained. Give a copy of the tokenizer whose post_processor adds "
            f"one{also}"
        )


def _assemble(files: _Files, spec: Spec, *, added_as_text: bool = False) -> HfTokenizer:
    from tokenizers import Tokenizer

    name, path = files.name, files.path
    refuse_missing_tokens(spec, files.side, name)
    controls = frozenset([*special_tokens(spec, files.side), *control_names(spec, files.side)])
    changed = without_control_tokens(files.data, spec, controls)
    if added_as_text:
        changed = {**(changed or files.data), "added_tokens": []}
    with named_failures(f"tokenizer {name!r}: {path} cannot be loaded", "fetch the file again"):
        backend = Tokenizer.from_file(str(path)) if changed is None else Tokenizer.from_str(json.dumps(changed))
    with named_failures(f"tokenizer {name!r}: {path} is loaded and fails at work", "fetch the file again"):
        return _checked(files, backend, spec, changed)


def _checked(files: _Files, backend: Any, spec: Spec, changed: Mapping[str, Any] | None) -> HfTokenizer:
    name, side = files.name, files.side
    if changed is None or changed["added_tokens"]:
        _refuse_moved_ids(backend, spec if changed is None else read_spec(changed, name), name)
    _as_plain_text(backend, special_tokens(spec, side) if changed is None else [])
    in_text = frozenset(token for token in role_candidates(spec, side) if _text_produces(backend, token))
    prefix = _prefix(backend)
    if unknown := [token for token in prefix if token not in spec.names]:
        raise XtokenError(
            f"tokenizer {name!r}: its post-processor puts id {unknown[0]} in front of a text, which no token has; "
            "fetch tokenizer.json again"
        )
    table = build_table(spec, side, name, bos=prefix[0] if prefix else None, in_text=in_text)
    normalizer, strips = text_normalizer(spec)
    tokenizer = HfTokenizer(
        backend,
        table,
        None if normalizer is None else _normalizer(normalizer),
        strips,
        spec.added_ids if backend.get_added_tokens_decoder() else {},
        controls={at: spec.names[at] for at, role in enumerate(table.role) if role not in (None, "hole")},
        prefix=prefix,
        cuts_at_spaces=keeps_tokens(files.data),
    )
    tokenizer.check()
    return tokenizer


def _refuse_moved_ids(backend: Any, spec: Spec, name: str) -> None:
    """The library numbers added tokens by itself: as the vocabulary does, or behind it in the order of the file."""
    for token_id, token in spec.added_ids.items():
        if backend.token_to_id(token.content) != token_id:
            raise XtokenError(
                f"tokenizer {name!r}: its added token {token.content!r} has id {token_id}, but it is loaded as "
                f"{backend.token_to_id(token.content)}: added tokens that the vocabulary has keep their id there, and "
                "the others follow on behind it. Fetch tokenizer.json again, or correct the id"
            )


def _as_plain_text(backend: Any, specials: list[str]) -> None:
    """Turn off everything that makes ids depend on more than the text."""
    backend.no_truncation()
    backend.no_padding()
    backend.add_special_tokens(specials)  # those only declared special beside the file become so
    backend.encode_special_tokens = True
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None


def _text_produces(backend: Any, token: str) -> bool:
    return backend.token_to_id(token) in backend.encode(token, add_special_tokens=False).ids


def _prefix(backend: Any) -> tuple[int, ...]:
    """The ids that the post-processor puts in front of a text: BOS, or several."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    starts = (at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain)
    return tuple(full[: next(starts, 0)])


def _normalizer(normalizer: str) -> Any:
    from tokenizers import Tokenizer

    # The library reads a normaliser from JSON only as a part of a tokenizer.
    shell = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    return Tokenizer.from_str(json.dumps({**shell, "normalizer": json.loads(normalizer)})).normalizer


def _local_file(source: str) -> Path | None:
    """tokenizer.json of a local source; None if ``source`` can only be a hub id."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".json" or path.name == "tekken.json":
            raise XtokenError(f"{source} is not a tokenizer.json; {_CONVERT}")
        return path
    if path.is_dir():
        if there(path / _FILE):
            return path / _FILE
        foreign = sorted(file.name for pattern in _FOREIGN for file in path.glob(pattern))
        holds = f"only {', '.join(foreign[:3])}" if foreign else "no tokenizer"
        raise XtokenError(f"folder {source} holds {holds}, but {_FILE} is needed; {_CONVERT}")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.suffix == ".json":
        raise XtokenError(f"{source} does not exist; give a folder with {_FILE}, that file, a hub id, or 'bytes'")
    return None


def _hub_file(source: str, revision: str | None, remote_code: bool) -> Path:
    """tokenizer.json of a hub id."""
    path = hub_file(source, _FILE, revision)
    if path is None:
        code = "; a tokenizer that is Python code cannot be used, whatever is trusted" if remote_code else ""
        raise XtokenError(
            f"{source!r} has no {_FILE} on the hub{code}. Give a local folder with {_FILE}; or {_CONVERT}"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        if content.startswith(b"version https://git-lfs"):
            raise XtokenError(
                f"{path} is a pointer of Git LFS, not the file itself; run 'git lfs pull' in its repository"
            )
        data = json.loads(content)
    except (OSError, ValueError) as error:
        raise XtokenError(f"{path} is not readable JSON ({error}); fetch the file again") from error
    if not isinstance(data, dict):
        raise XtokenError(f"{path} is JSON, but not an object; fetch the file again")
    return data
