"""What every page has: its head, a policy that forbids it to load anything, and the common style."""

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import Any

from xtoken.schemas.ui.markup import escaped

# What a JSON text may hold and a script element or a reader's eye must not meet.
_ESCAPED = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029\u200e\u200f\u061c\ufeff"}
_ESCAPED |= {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def asset(name: str, package: str = "xtoken.pipeline.html") -> str:
    """Text of a style sheet or script of a package."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def document(title: str, body: str, style: str, *, script: str = "", data: Any = None) -> str:
    """A whole page that loads nothing, whatever its content says.

    Args:
        title: plain text.
        body: markup.
        style: style sheet that follows the common one. Where there is a script, markup has no style attributes.
        script: runs after the body was read, if any.
        data: JSON that the script finds in the element ``data``.
    """
    sheet = asset("base.css") + style
    allowed = f"script-src {_source(script)}; style-src {_source(sheet)}" if script else "style-src 'unsafe-inline'"
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; {allowed}"
    scripts = icon = ""
    if script:
        scripts = f'<script type="application/json" id="data">{json_text(data)}</script><script>{script}</script>'
        icon = '<link rel="icon" href="data:,">'  # or browsers ask a server for one
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<title>{html.escape(title)}</title><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{icon}<style>{sheet}</style></head><body>{body}{scripts}</body></html>\n"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def json_text(value: Any) -> str:
    """Compact JSON that ends no script element and holds no character that turns or hides what stands beside it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPED)


def short(name: str) -> str:
    """The last part of a path or repository that is not just the file's name."""
    parts = [part for part in name.split("/") if part and part != "tokenizer.json"]
    return parts[-1] if parts else name


def facts(numbers: list[tuple[str, str]]) -> str:
    """A row of numbers with what each counts; plain text both."""
    return (
        '<ul class="facts">' + "".join(f"<li><b>{escaped(n)}</b> {escaped(what)}</li>" for n, what in numbers) + "</ul>"
    )
