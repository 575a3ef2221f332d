"""The field's words in what people read: old terms of this project do not come back into documents, help and messages.

Code in Markdown is left out, since names on disk and flags stay as they are; so are measured results.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from xtoken import cli

ROOT = Path(cli.__file__).resolve().parent
# What is refused, and what is said instead.
PHRASES = {
    r"\bREST\b": "tail mass",
    r"\brealised (tokens?|log-prob\w*)": "label",
    r"\bset aside\b": "quarantined",
    r"\b(is|are) no numbers?\b": "NaN or inf",
    r"\bhead (is |has )?folded\b|\bhas the head folded\b": "fused linear loss",
    r"\bfilling (of|at|in)\b": "padding",
    r"\bstrangers?\b": "untrusted",
    r"\bdraws\b(?! runs as)": "samples",
    r"\bwhole rows?\b": "full distribution",
    r"\bcells?\b": "partition, entry or category",
    r"\b(hired?|hires|dismiss(ed|es)?|bur(y|ied))\b": "spawn, release, reap",
    r"\bhears?\b(?!\s+gives)|\bis told\b|\btells? nobody\b": "receive, send",
    r"\bsays? what|\bwhat (those|these|it|they) (that|have|has) \w+ says?\b": "a sentence that names the thing",
}
# Phrases that no message of the code uses any more. The schema's column texts are on disk and stay.
GONE = [r"\bhead (is |has )?folded\b|\bhas the head folded\b", r"\bstrangers?\b", r"\b(hired?|hires|dismiss(ed|es)?)\b"]
ON_DISK = {"schemas/tables.py", "schemas/losses.py"}
MARKDOWN = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "pipeline/*.md", "trainer/*.md", "benchmarks/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # tells what was, in the words of then
)
_CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`]*`", re.MULTILINE | re.DOTALL)


def old_terms(text: str, phrases: list[str]) -> list[str]:
    """What of ``text`` is an old term, and a few words around it."""
    text = re.sub(r"\s+", " ", text)
    return [text[max(0, m.start() - 30) : m.end() + 30] for phrase in phrases for m in re.finditer(phrase, text)]


def prose(markdown: str) -> str:
    """Markdown without code; link targets stay, which are names."""
    return re.sub(r"\]\([^)]*\)", "]", _CODE.sub(" ", markdown))


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_the_words_of_the_field(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "glossary.md":
        text = re.sub(r"\| flag|on disk.*", "", text)
    assert old_terms(prose(text), list(PHRASES)) == []


def helps() -> Iterator[tuple[str, str]]:
    """The help of each verb and of each of its flags that are shown."""
    for group in (cli.app, cli.share_app):
        for verb, command in typer.main.get_command(group).commands.items():  # type: ignore[attr-defined]
            yield verb, command.help or ""
            for parameter in command.params:
                if not parameter.hidden:
                    yield f"{verb} {parameter.opts[0]}", getattr(parameter, "help", None) or ""


def test_help_uses_the_words_of_the_field() -> None:
    shown = {where: re.sub(r"Example: .*", "", text, flags=re.DOTALL) for where, text in helps()}
    assert len(shown) > 100
    found = {where: old_terms(text, list(PHRASES)) for where, text in shown.items()}
    assert {where: terms for where, terms in found.items() if terms} == {}


def strings(tree: ast.Module) -> Iterator[str]:
    """String constants of a module that are no docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    texts = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value


@pytest.mark.parametrize("layer", ["schemas", "pipeline", "trainer"])
def test_messages_use_no_phrase_that_is_gone(layer: str) -> None:
    for path in sorted((ROOT / layer).rglob("*.py")):
        if str(path.relative_to(ROOT)) not in ON_DISK:
            for text in strings(ast.parse(path.read_text(encoding="utf-8"))):
                assert old_terms(text, GONE) == [], path


def test_an_old_term_is_found() -> None:
    markdown = "Mass goes\nto REST.\n\n```\nREST\n```\n`--on-bad set-aside` is a flag, a shard set\naside is not."
    assert len(old_terms(prose(markdown), list(PHRASES))) == 2
