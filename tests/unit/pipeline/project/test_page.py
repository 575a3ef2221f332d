"""coverage.html: what it says, and that no token or name gets out of its place."""

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtoken.pipeline.project import Audit, build_w, coverage
from xtoken.pipeline.project.mass import Mass
from xtoken.pipeline.project.page import coverage_page, literal, weight_flow
from xtoken.pipeline.tokens import TokenTable
from xtoken.schemas.categories import CATEGORIES

VOID = {"meta", "rect"}
EVIL = [b"<script>alert(1)</script>", b'"><img src=x onerror=alert(1)>', b"&lt;", b"'", b"\xff<b>", "‮abc".encode()]


class Strict(HTMLParser):
    """Collects tags and text; refuses tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Strict:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def page_of(student: TokenTable, teacher: TokenTable, mass: Mass | None = None, rule: str = "pieces") -> str:
    audit = Audit.of(build_w(student, teacher, rule), student, teacher, mass)
    return coverage_page(audit, coverage(audit), rule)


def test_tokens_and_names_are_escaped(toy: Callable[..., TokenTable]) -> None:
    student = toy(EVIL, name="<img src=x onerror=alert(1)>", specials=["eos"])
    teacher = toy([*EVIL, *(bytes([b]) for b in range(33, 127))], name='"</title><script>', specials=["eos"])
    found = parsed(page_of(student, teacher))
    assert not found.tags & {"script", "img", "b onerror", "link", "iframe"}
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    shown = "".join(found.text)
    assert "alert(1)" in shown
    assert "\u202e" not in shown, "a token must not turn the text around it"
    assert r"b'\xff<b>'" in shown


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=12, unique=True), st.text(max_size=8))
def test_any_bytes_make_a_well_formed_page(toy: Callable[..., TokenTable], pieces: list[bytes], name: str) -> None:
    name = name.encode("utf-8", "replace").decode()
    page = page_of(toy(pieces, name=name), toy([bytes([b]) for b in range(256)], name=name))
    page.encode()
    plain = parsed(page_of(toy([b"a", "é".encode(), b"\xff"], name="é"), toy([b"a"], name="é")))
    assert parsed(page).tags <= plain.tags


def test_nothing_outside_the_page_is_needed(table: Callable[[str], TokenTable]) -> None:
    page = page_of(table("bytes"), table("llama2"))
    assert not [word for word in ("http:", "https:", "url(", "@import", "<script", "src=") if word in page]
    assert "prefers-color-scheme:dark" in page
    assert len(page) < 100_000


def test_the_page_says_what_the_audit_found(table: Callable[[str], TokenTable]) -> None:
    student, teacher = table("smollm2"), table("llama2")
    share_U = np.full(teacher.size, 0.75 / teacher.size)
    audit = Audit.of(build_w(student, teacher), student, teacher, Mass(share_U, 0.25, 1234))
    figures = coverage(audit)
    shown = "".join(parsed(coverage_page(audit, figures, "pieces")).text)
    latin: dict[str, Any] = figures["categories"]["latin"]
    for number in (latin["student"], latin["exact"], latin["pieces"], latin["teacher"], latin["moved"], 1234):
        assert f"{number:,}" in shown
    assert f"{figures['mass_by_category']['latin']['mass']:.2%}" in shown
    assert figures["advice"]["reason"] in shown
    assert f"{100 * weight_flow(audit)[CATEGORIES.index('latin'), CATEGORIES.index('latin')]:.1f}" in shown


def test_pieces_of_numerals_are_shown(toy: Callable[..., TokenTable]) -> None:
    digits = [str(n).encode() for n in range(10)]
    shown = "".join(parsed(page_of(toy([*digits, b"42", b"777"]), toy(digits))).text)
    assert "'42''4'\xa00.909, '2'\xa00.091" in shown
    assert "'777''7'\xa01.000" in shown


def test_mined_rows_are_shown(toy: Callable[..., TokenTable]) -> None:
    shown = "".join(parsed(page_of(toy([b"42", b"7"]), toy([b"43", b"4", b"7"]), rule="mined")).text)
    assert "mined'42''43'\xa01.000" in shown
    assert "Rule mined" in shown


@pytest.mark.parametrize("rule", ["pieces", "reverse", "random", "masked:latin"])
def test_weight_flow_against_a_slow_sum(table: Callable[[str], TokenTable], rule: str) -> None:
    student, teacher = table("bytes"), table("llama2")
    audit = Audit.of(build_w(student, teacher, rule), student, teacher)
    expected = np.zeros((len(CATEGORIES), len(CATEGORIES) + 1))
    rows: dict[int, list[tuple[int, float]]] = {s: [] for s in range(student.size)}
    w = audit.projection
    for s, t, weight in zip(w.student_id.tolist(), w.teacher_id.tolist(), w.weight.tolist(), strict=True):
        rows[s].append((t, weight))
    for s, entries in rows.items():
        for t, weight in entries:
            expected[audit.student_V[s], audit.teacher_U[t]] += weight
        expected[audit.student_V[s], -1] += not entries
    found = weight_flow(audit)
    size = np.bincount(audit.student_V, minlength=len(CATEGORIES))
    assert found * size[:, None] == pytest.approx(expected, abs=1e-6 * student.size)
    assert found.sum(axis=1) == pytest.approx((size > 0).astype(float), abs=1e-6)


def test_literals() -> None:
    assert literal(" né\n".encode()) == "' né\\n'"
    assert literal(b"\xe6\x9d") == "b'\\xe6\\x9d'"
    assert literal(b"x" * 30) == f"'{'x' * 20}'… (30 bytes)"
