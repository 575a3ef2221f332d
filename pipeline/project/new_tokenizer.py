"""The files of a transplanted model's tokenizer: chat template, roles, and a class that reads tokenizer.json only."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtoken.pipeline.corpus import Corpus
from xtoken.pipeline.project.controls import control_pairs, translated
from xtoken.pipeline.project.transplant import kept_map, map_tokens, most_pieces
from xtoken.pipeline.tokens import load_tokenizer, refuse_long_prefix
from xtoken.pipeline.tokens.prune import check_refines, prune_files, sample_texts
from xtoken.schemas.configs.capture import ONLY, CorpusConfig
from xtoken.schemas.configs.transplant import TransplantConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.heads import refuse_narrow_head, stated_rows
from xtoken.schemas.io.hub_files import there
from xtoken.schemas.token_map import EQUAL, TokenMap

if TYPE_CHECKING:
    from xtoken.pipeline.tokens import TextTokenizer

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_ROLES = ("bos", "eos", "pad", "unk")
# What a tokenizer's settings say of the model that it came with.
_OF_ITS_MODEL = ("chat_template", "auto_map", "model_max_length", "processor_class")
# tokenizer.json is all that counts: classes that rebuild a tokenizer from other files have given other ids.
_CLASS = "PreTrainedTokenizerFast"


def read_template(folder: Path) -> str | None:
    """The chat template of a folder of tokenizer files; of several, the one named default.

    Raises:
        XtokenError: it is not text.
    """
    if there(folder / _TEMPLATE):
        try:
            return (folder / _TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise XtokenError(f"{folder / _TEMPLATE} is not UTF-8 ({error.reason}); fetch the file again") from error
    found = _config(folder).get("chat_template")
    if isinstance(found, list):
        named = (one for one in found if isinstance(one, Mapping) and one.get("name") == "default")
        found = next((one.get("template") for one in named), None)
    return found if isinstance(found, str) else None


def pick_template(
    old: "TextTokenizer", new: "TextTokenizer", ours: str | None, theirs: str | None, pairs: Mapping[int, int]
) -> tuple[str | None, str]:
    """The chat template of the new model, and where it is from: ``model``, ``tokenizer`` or ``none``.

    The model's, written in the new control tokens, where the new tokenizer has each that it uses; else the new
    tokenizer's own, else none. Tokens are never added.
    """
    moved = None if ours is None else translated(ours, old, new, theirs, pairs)
    if moved is not None:
        return moved, "model"
    return theirs, "none" if theirs is None else "tokenizer"


def finish_files(folder: Path, tokenizer: "TextTokenizer", template: str | None) -> None:
    """Write a chat template, and roles by name, into a folder of tokenizer files.

    Roles that only a config.json beside the tokenizer told are written down here, since the new model's config.json
    is another one; where no file tells one, that there is none.
    """
    config, others = _config(folder), _json(folder / "special_tokens_map.json")
    for name in _OF_ITS_MODEL:
        config.pop(name, None)
    for role in _ROLES:
        key, token = f"{role}_token", tokenizer.table.id_of(role)
        if config.get(key) is None and not (token is None and key in others):
            config[key] = None if token is None else tokenizer.controls[token]
    config["tokenizer_class"] = _CLASS
    (folder / _CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / _TEMPLATE).unlink(missing_ok=True)
    if template is not None:
        (folder / _TEMPLATE).write_text(template, encoding="utf-8")


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / _CONFIG)


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes()) if there(path) else {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True, eq=False)
class Plan:
    """A change of tokenizer, known before the model is loaded.

    Attributes:
        old, new: the two tokenizers.
        token_map: the old ids of each new token.
        figures: of the report.
        notes: what the user should know.
    """

    old: "TextTokenizer"
    new: "TextTokenizer"
    token_map: TokenMap
    figures: dict[str, Any]
    notes: list[str]


def open_tokenizers(config: TransplantConfig) -> tuple["TextTokenizer", "TextTokenizer | None"]:
    """The model's tokenizer and the new one; None for one that is made here (bytes, or fewer merges).

    Raises:
        XtokenError: one cannot be loaded, they are the same, the model's head lacks tokens of text, or the new one puts
            several tokens in front of a text.
    """
    old = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    refuse_narrow_head(config.model, stated_rows(config.model), old.table.role, old.table.pieces())
    if config.tokenizer is None or config.tokenizer == "bytes":
        return old, None
    new = load_tokenizer(config.tokenizer)
    _refuse_same(config, old, new)
    refuse_long_prefix(new)
    return old, new


def _refuse_same(config: TransplantConfig, old: "TextTokenizer", new: "TextTokenizer") -> None:
    if new.table.info.hash == old.table.info.hash:
        raise XtokenError(
            f"{config.model} has the tokenizer {config.tokenizer} already (equal hash), so nothing would change; give "
            "another --tokenizer"
        )


def plan_transplant(
    config: TransplantConfig, old: "TextTokenizer", new: "TextTokenizer | None", model_files: Path, folder: Path
) -> Plan:
    """Finish the files of the new tokenizer and map its tokens to the model's.

    Args:
        config: the verb's.
        old, new: from ``open_tokenizers``.
        model_files: folder of the files of the model's tokenizer.
        folder: with the files of the new tokenizer, or of the model's own that is to be cut. They are changed in place.

    Raises:
        XtokenError: a model of bytes that is to be one, a donor that cannot serve, or see ``tokens.prune``.
    """
    rows = stated_rows(config.model)
    ours = read_template(model_files)
    if config.keep_merges is not None:
        return _cut(config, old, folder, ours, old.table.size if rows is None else rows)
    if new is None:
        new = load_tokenizer(str(folder))
        _refuse_same(config, old, new)
    theirs = read_template(folder)
    pairs = control_pairs(new, old, theirs, ours)
    template, whose = pick_template(old, new, ours, theirs, pairs)
    finish_files(folder, new, template)
    token_map = map_tokens(new.table, old.table, pairs, rows)
    if config.donor is not None:
        _refuse_donor(config, new, token_map)
    worst = most_pieces(token_map, new.table, old.table)
    figures = {"tokenizer": str(config.tokenizer), "template": whose, "most_pieces": worst}
    return Plan(old, new, token_map, _hashes(old, new) | figures, _bos_notes(old, new))


def _refuse_donor(config: TransplantConfig, new: "TextTokenizer", token_map: TokenMap) -> None:
    donor = load_tokenizer(str(config.donor), trust_remote_code=config.trust_remote_code).table.info
    if donor.hash != new.table.info.hash:
        raise XtokenError(
            f"--donor {config.donor} has another tokenizer ({donor.hash[:12]}) than --tokenizer {config.tokenizer} "
            f"({new.table.info.hash[:12]}), and needs a row for each of its tokens; give --tokenizer {config.donor}, "
            "or a donor of that tokenizer"
        )
    if not len(token_map.of(EQUAL)):
        raise XtokenError(
            f"--donor {config.donor} shares no token of text with {config.model}, and sums are taken over shared "
            "tokens; use --init fvt"
        )


def _cut(config: TransplantConfig, old: "TextTokenizer", folder: Path, template: str | None, rows: int) -> Plan:
    """The plan of ``--keep-merges``."""
    assert config.keep_merges is not None
    finish_files(folder, old, template)  # roles by name, which the smaller one is to have too
    kept = prune_files(folder, old.table.info.name, config.keep_merges)
    new = load_tokenizer(str(folder))
    compared = check_refines(new, old, _texts(config))
    whose = "none" if template is None else "model"
    named = f"the first {config.keep_merges:,} merges of its own"
    figures = {"tokenizer": named, "template": whose, "bytes_compared": compared}
    return Plan(old, new, kept_map(new.table, kept, rows), _hashes(old, new) | figures, [])


def _texts(config: TransplantConfig) -> Iterable[str]:
    if config.text is None:
        return sample_texts()
    corpus = Corpus(CorpusConfig(corpus=config.text, split=[ONLY]))
    return (document.text for document in corpus.documents())


def _hashes(old: "TextTokenizer", new: "TextTokenizer") -> dict[str, Any]:
    return {"hash_before": old.table.info.hash, "hash": new.table.info.hash, "tokens": new.table.size}


def _bos_notes(old: "TextTokenizer", new: "TextTokenizer") -> list[str]:
    """A model reads BOS before a text, or does not, as its tokenizer does."""
    before, now = old.table.info.adds_bos, new.table.info.adds_bos
    if before == now:
        return []
    reads, puts = ("BOS", "none") if before else ("no BOS", "one")
    return [
        f"the model reads {reads} before a text, and the new tokenizer puts {puts} there: expect worse figures until "
        "it is trained"
    ]


def same_tokenizer(folder: Path, new: "TextTokenizer") -> None:
    """Check that what stands in a folder, config.json included, is read as this tokenizer.

    Raises:
        XtokenError: it is another one.
    """
    found = load_tokenizer(str(folder)).table
    if found.info.hash != new.table.info.hash or found.info.adds_bos != new.table.info.adds_bos:
        differ = [i for i, (a, b) in enumerate(zip(found.role, new.table.role, strict=False)) if a != b]
        named = f", roles differ at id {differ[0]}" if differ else ""
        raise XtokenError(
            f"the tokenizer {new.table.info.name!r} is not read back as it was from the files that transformers would "
            f"read{named}; write bos_token, eos_token, pad_token and unk_token into its tokenizer_config.json"
        )
