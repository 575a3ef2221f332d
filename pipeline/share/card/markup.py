"""Untrusted words made harmless: model names and sources stand in a card as text and can be nothing else."""

import re
from collections.abc import Mapping
from typing import Any

from xtoken.schemas.configs.share import LICENSED

_LONGEST = 160
# The licence identifiers of the hub, of which huggingface_hub has no list; others go by ``license: other`` and a name.
_IDENTIFIERS = (
    "afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 "
    "bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 "
    "cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 "
    "etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 "
    "lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 "
    "openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib "
)
HUB_LICENSES = frozenset(_IDENTIFIERS.split())


def one_line(value: object) -> str:
    """Printable characters on one line, of bounded length."""
    text = "".join(char if char.isprintable() else " " for char in str(value))
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def public(name: str) -> str:
    """A model's or corpus's name without where it lies on the writer's machine; ids and URLs stay whole."""
    absolute = name.startswith(("/", "~", "\\", "file:")) or re.match(r"[A-Za-z]:[\\/]", name)
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if absolute else name


def code(value: object) -> str:
    """A code span: neither Markdown nor HTML nor links are seen in it, and nothing in it ends it."""
    return f"`{one_line(value).replace('`', chr(39)).replace('|', '¦') or '-'}`"


def plain(value: object) -> str:
    """Text in Markdown: every ASCII sign becomes an entity, which starts no markup."""
    safe = (char.isalnum() or char in " ," or ord(char) > 127 for char in one_line(value))
    return "".join(char if ok else f"&#{ord(char)};" for char, ok in zip(one_line(value), safe, strict=True))


def latex(value: object) -> str:
    """Text in a BibTeX field: signs that mean something there are gone."""
    safe = (char if char.isalnum() or char in " .,:/+()-" or ord(char) > 127 else " " for char in one_line(value))
    return " ".join("".join(safe).split())


def license_fields(licenses: Mapping[str, str]) -> dict[str, Any]:
    """The hub's licence fields: an identifier where both licences are the same known one, else ``other`` by name."""
    known = {licenses[name].strip().lower() for name in LICENSED}
    if len(known) == 1 and known <= HUB_LICENSES:
        return {"license": known.pop()}
    name = "-".join(f"{name}-{_slug(licenses[name])}" for name in LICENSED)
    links = [licenses[name] for name in LICENSED if re.fullmatch(r"https://[\w./?=&%#~-]+", licenses[name].strip())]
    return {"license": "other", "license_name": name} | ({"license_link": one_line(links[0])} if links else {})


def _slug(text: str) -> str:
    text = re.sub(r"^https?://", "", text.strip().lower())
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.")[:60] or "custom"
