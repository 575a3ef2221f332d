"""The files that make a model folder complete: its tokenizer's."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from xtoken.schemas.errors import XtokenError
from xtoken.schemas.io.hub_files import commit_of, hub_file, there

CHAT_TEMPLATE = "chat_template.jinja"  # what transformers reads before the one in tokenizer_config.json
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
)
# Without them it is another tokenizer; the others say again what is in tokenizer.json.
_TELLING = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)
_BYTES_CONTROLS = {"bos": "<|bos|>", "eos": "<|eos|>", "eot": "<|eot|>", "pad": "<|pad|>"}
_BYTES_README = """# A student of bytes

Token ids are the bytes of UTF-8 text, 0 to 255; there is no BOS, EOS or padding token, and ids above 255 were never
trained. `tokenizer.json` says this to other programs:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (auto.from_pretrained(".") for auto in (AutoTokenizer, AutoModelForCausalLM))
ids = tokenizer("In the beginning", return_tensors="pt").input_ids  # = list("In the beginning".encode())
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))
```

To xtoken it is the tokenizer `bytes`: `xtoken eval . --tokenizer bytes --text held-out.jsonl`.
"""


def copy_tokenizer(source: str, out: Path) -> None:
    """Put the tokenizer files of a folder, a tokenizer.json, a Hugging Face id, or ``bytes`` into ``out``.

    Raises:
        XtokenError: a file cannot be reached, and nobody can tell if there is one.
    """
    if source == "bytes":
        _write_bytes_tokenizer(out)
        return
    folder, main = located(source)
    for name in TOKENIZER_FILES:
        file = main if name == "tokenizer.json" and main is not None else folder / name
        if there(file):
            shutil.copyfile(file, out / name)


def located(source: str) -> tuple[Path, Path | None]:
    """The folder of a tokenizer's files and, if ``source`` is a file, that file.

    Raises:
        XtokenError: as ``copy_tokenizer``.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, path
    if os.path.isdir(path):
        return path, None
    return _fetched(source), None


def _fetched(repo: str) -> Path:
    """The folder of a hub id in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(TOKENIZER_FILES)))
    except LocalEntryNotFoundError as error:
        snapshot = getattr(error, "snapshot_path", None)  # it lacks files, perhaps none that matters
        if snapshot is None:
            raise XtokenError(
                f"the tokenizer files of {repo!r} are neither in the cache nor to be fetched; check the connection"
            ) from error
        folder = Path(snapshot)
    for name in _TELLING:
        if not there(folder / name):
            hub_file(repo, name, commit_of(folder / name))
    return folder


def _write_bytes_tokenizer(out: Path) -> None:
    _bytes_tokenizer().save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (out / "README.md").write_text(_BYTES_README)


def write_bytes_with_controls(out: Path, adds_bos: bool) -> None:
    """A tokenizer of 256 bytes and, from id 256 on, BOS, EOS, end-of-turn and padding, as files in ``out``.

    The tokenizer ``bytes`` has no control tokens, and targets rely on its 256 ids, so this is another one: it is read
    from its folder, like any. Text of its ids below 256 has the same ids in both.

    Args:
        out: the folder.
        adds_bos: whether it puts BOS in front of a text, as the model's own tokenizer does.
    """
    from tokenizers import processors

    tokenizer = _bytes_tokenizer()
    tokenizer.add_special_tokens(list(_BYTES_CONTROLS.values()))
    if adds_bos:
        bos = _BYTES_CONTROLS["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(out / "tokenizer.json"))
    roles = {f"{role}_token": _BYTES_CONTROLS[role] for role in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _bytes_tokenizer() -> Any:
    """A tokenizer whose ids are bytes: the usual byte-level alphabet in the order of bytes, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
