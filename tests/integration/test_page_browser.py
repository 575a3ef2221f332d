"""A sample's page in a real Chromium: what it shows is what is stored, and a hostile text stays text."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, chromium

from xtoken.pipeline.align import align
from xtoken.pipeline.capture import precompute
from xtoken.pipeline.html.visible import plain, visible
from xtoken.pipeline.page.sample import Sample, load_sample
from xtoken.pipeline.page.sample_page import write_page
from xtoken.schemas.configs.artifacts import AlignConfig, InspectConfig
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.ui.progress import Silent

TINY = Path(__file__).resolve().parents[1] / "golden" / "captures" / "tiny"
ATTACK = "</script><script>owned=1</script><img src=x onerror=owned=1><svg onload=owned=1>&lt;b a='\"{{"
UNSEEN = "a\u200bb \u202ec\u2066d \ufeffe\x00f\x1bg\u00a0h\u3164 \u2028 👩\u200d👧 "
SEEN = "abcdefgh👩👧 "
TEXTS = {
    "hostile": f"{ATTACK} {UNSEEN}" * 2,
    "scripts": "مرحبا بالعالم and שלום עולם, 日本語のテキスト。 The quick brown fox, 12345 times.\n\tIt jumps.\n",
}
ROUNDED = {"p": 6e-3, "nats": 6e-4}  # relative of a percentage, absolute of nats, as the page prints them


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Callable[[str], Path]) -> Path:
    """A folder with a capture, targets for a small tokenizer and for bytes, and pages of both samples."""
    root = tmp_path_factory.mktemp("pages")
    (root / "corpus").mkdir()
    for name, text in TEXTS.items():
        (root / "corpus" / f"{name}.txt").write_text(text, newline="")
    teacher = str(tokenizer_file("smollm2"))
    config = PrecomputeConfig.from_flat(
        corpus=str(root / "corpus"), teacher=teacher, out=str(root / "capture"), backend="fake", k=16, min_p=0.01
    )
    precompute(config, Silent())
    for name, student in (("tiny", str(TINY)), ("bytes", "bytes")):
        losses = ["p-kl", "h-kl", "byte-prefix", "alm", "gold", "uld", "strict"]
        out = str(root / name)
        align(AlignConfig(captures=[str(root / "capture")], student=student, out=out, losses=losses), Silent())
        for sample in TEXTS:
            write_page(page_config(root, name, sample))
    write_page(InspectConfig(path=str(root / "capture"), html="scripts.txt:0#0", out=str(root / "alone.html")))
    return root


def page_config(root: Path, student: str, sample: str) -> InspectConfig:
    return InspectConfig(
        path=str(root / student),
        html=f"{sample}.txt:0#0",
        capture=str(root / "capture"),
        out=str(root / f"{sample}-{student}.html"),
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def table(browser: Browser, pane: str) -> list[tuple[str, float, float]]:
    """Name, probability and nats of each entry of a table, REST left out."""
    rows = browser.evaluate(
        f"[...document.querySelectorAll('.pane.{pane} tbody tr:not(.rest)')]"
        ".map(row => ['.name .piece', '.p', '.nats'].map(cell => row.querySelector(cell).textContent))"
    )
    return [(name, float(p.rstrip(" %")) / 100, float(nats.replace("−", "-"))) for name, p, nats in rows]


def entries(sample: Sample, token: int) -> list[tuple[str, float]]:
    """What decode gives for the row at a token: the token as shown, and its log-probability."""
    assert sample.rows is not None
    row = token - sample.row["first_row"]
    at = range(*sample.rows.offsets[row : row + 2].tolist())
    return [(shown(sample, int(sample.rows.ids[k])), float(sample.rows.logprob[k])) for k in at]


def shown(sample: Sample, token: int) -> str:
    return re.sub(r"\[(.*?)\]", r"\1", plain(sample.teacher.shown(token)))


def close(found: list[tuple[str, float, float]], wanted: list[tuple[str, float]]) -> None:
    assert [re.sub(r"[\[\]]", "", name) for name, _, _ in found] == [re.sub(r"[\[\]]", "", name) for name, _ in wanted]
    assert [nats for _, _, nats in found] == pytest.approx([value for _, value in wanted], abs=ROUNDED["nats"])
    assert [p for _, p, _ in found] == pytest.approx([math.exp(value) for _, value in wanted], rel=ROUNDED["p"])


@pytest.mark.parametrize("name", ["scripts-tiny", "scripts-bytes", "hostile-tiny", "hostile-bytes", "alone"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_page_loads_alone_and_fits(pages: Path, browser: Browser, name: str, width: int, dark: bool) -> None:
    browser.open(pages / f"{name}.html", width, dark=dark)
    browser.hover(".chunk:nth-of-type(3) .tok")
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("typeof owned") == "undefined"
    assert browser.evaluate("document.querySelectorAll('img, iframe, object').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 2


@pytest.mark.parametrize("student", ["tiny", "bytes"])
@pytest.mark.parametrize("name", list(TEXTS))
def test_chunks_and_tokens_are_those_of_the_targets(pages: Path, browser: Browser, student: str, name: str) -> None:
    sample = load_sample(page_config(pages, student, name))
    assert sample.targets is not None
    row = sample.targets.row
    browser.open(pages / f"{name}-{student}.html")
    assert len(browser.texts(".chunk:not(.tail)")) == len(row["chunk_student_end"]) > 20
    for side, ids in (("t", sample.row["teacher_ids"]), ("s", row["student_ids"])):
        assert len(browser.texts(f".line.{side} .tok")) == len(ids)
    assert len(browser.texts(".chunk.norow:not(.tail)")) == int(np.isnan(row["teacher_logprob"]).sum())
    # boxes stand in the order of the text, whatever scripts they hold
    places = browser.evaluate("[...document.querySelectorAll('.chunk')].map(c => [c.offsetTop, c.offsetLeft])")
    assert places == sorted(places)


def test_what_is_unseen_is_shown(pages: Path, browser: Browser) -> None:
    browser.open(pages / "hostile-tiny.html")
    text = "".join(browser.texts("#flow .text"))
    assert ATTACK.replace(" ", "·") in text
    for char in sorted(set(UNSEEN) - set(SEEN)):
        # a token, or a chunk, may end inside a character
        assert plain(visible(char.encode())).strip("[]") in text or char.encode().hex().upper() in text.replace(" ", "")
    assert not set(text) & set(UNSEEN) - set(SEEN), "the space is one between two bytes in hex"


def test_a_token_under_the_mouse_shows_its_row_and_target(pages: Path, browser: Browser) -> None:
    sample = load_sample(page_config(pages, "tiny", "scripts"))
    assert sample.targets is not None
    row = sample.targets.row
    browser.open(pages / "scripts-tiny.html")
    for chunk in (2, 7, len(row["chunk_teacher_end"]) - 2):
        token = row["chunk_teacher_end"][chunk - 1]
        browser.hover(f'.tok[data-side="t"][data-k="{token}"]')
        found = table(browser, "row")
        close(found[: len(entries(sample, token))], entries(sample, token))
        start = sum(row["pkl_count"][:chunk])
        at = range(start, start + row["pkl_count"][chunk])
        close(table(browser, "target"), [(shown(sample, row["pkl_ids"][k]), row["pkl_logprob"][k]) for k in at])
        real = browser.texts(".pane.row tr.real .piece")
        assert real == [re.sub(r"[\[\]]", "", shown(sample, sample.row["teacher_ids"][token]))]


def test_every_loss_has_its_table(pages: Path, browser: Browser) -> None:
    sample = load_sample(page_config(pages, "bytes", "scripts"))
    assert sample.targets is not None
    row, chunk = sample.targets.row, 5
    browser.open(pages / "scripts-bytes.html")
    browser.click(f'.chunk[data-chunk="{chunk}"] .tok')
    sizes = {"uld": row["uld_count"][chunk], "alm": 1 + math.isfinite(row["alm_space_logprob"][chunk])}
    for loss in ("p-kl", "h-kl", "byte-prefix", "gold", "uld", "strict", "alm"):
        browser.click(f'[data-loss="{loss}"]')
        assert browser.evaluate(f"document.querySelector('[data-loss=\"{loss}\"]').ariaPressed") == "true"
        rows = browser.texts(".pane.target tbody tr")
        # this chunk has several student tokens, so strict has none
        assert bool(rows) == (loss != "strict")
        said = "no entries for this chunk" in " ".join(browser.texts(".pane.target p"))
        assert said == (loss == "strict")
        if loss in sizes:
            assert len(rows) >= min(sizes[loss], 8)
    token = row["chunk_student_end"][chunk - 1] + 1
    assert token < row["chunk_student_end"][chunk], "the chunk has a second student token"
    browser.press("Escape")
    browser.hover(f'.tok[data-side="s"][data-k="{token}"]')
    start = sum(row["prefix_count"][:token])
    at = range(start, start + row["prefix_count"][token])
    wanted = [(plain(sample.targets.student.shown(row["prefix_ids"][k])), row["prefix_logprob"][k]) for k in at]
    close(table(browser, "target"), wanted)
    assert browser.complaints() == []


def test_keys_move_the_focus(pages: Path, browser: Browser) -> None:
    browser.open(pages / "scripts-tiny.html")
    focus = "document.activeElement.dataset.chunk"
    for key, chunk in (("Tab", "0"), ("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1"), ("Home", "0")):
        browser.press(key)
        assert browser.evaluate(focus) == chunk
        assert browser.evaluate("document.activeElement.matches(':focus-visible')")
        assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert browser.texts("#dock b")[0].startswith(f"Chunk {int(chunk) + 1} of ")
    browser.press("End")
    last = len(browser.texts(".chunk:not(.tail)")) - 1
    assert browser.evaluate(focus) == str(last)
    box, dock = (browser.evaluate(f"(b => [b.top, b.bottom])({e}.getBoundingClientRect())") for e in
                 ("document.activeElement", "document.getElementById('dock')"))  # fmt: skip
    assert 0 <= box[0] < box[1] <= dock[0], "the focused chunk lies above the dock"
    browser.press("ArrowRight")
    assert browser.evaluate(focus) == str(last)


def test_keys_move_within_a_chunk_and_hold(pages: Path, browser: Browser) -> None:
    browser.open(pages / "scripts-bytes.html")
    browser.press("Tab")
    browser.press("ArrowRight")
    chosen = "(e => e.dataset.side + e.dataset.k)(document.querySelector('.tok.on'))"
    seen = [browser.evaluate(chosen)]
    for _ in range(2):
        browser.press("ArrowDown")
        seen.append(browser.evaluate(chosen))
    assert seen[0] == "t1"
    assert len(set(seen)) == 3
    browser.press("Enter")
    before = browser.texts("#dock")
    assert "held" in before[0]
    browser.hover('.chunk[data-chunk="9"] .tok')
    assert browser.texts("#dock") == before
    browser.press("Escape")
    browser.hover('.chunk[data-chunk="8"] .tok')
    assert browser.texts("#dock b")[0].startswith("Chunk 9 of ")


def test_the_strip_goes_to_the_text(pages: Path, browser: Browser) -> None:
    browser.open(pages / "scripts-tiny.html", 390)
    spots = len(browser.texts("#strip rect.spot"))
    wanted = browser.evaluate(f"document.querySelectorAll('#strip rect.spot')[{spots - 5}].dataset.chunk")
    browser.click(f"#strip rect.spot:nth-of-type({2 * (spots - 5) + 2})")
    assert browser.evaluate("document.activeElement.dataset.chunk") == wanted
    assert int(wanted) > 5


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a golden capture's conversations: with targets for another template, and the capture alone."""
    root = tmp_path_factory.mktemp("chats")
    capture, targets = str(TINY.parent / "v6-chats"), str(TINY.parent / "v7-targets")
    for number in range(1, 5):
        name = f"chats.jsonl:{number}#0"
        write_page(InspectConfig(path=targets, html=name, capture=capture, out=str(root / f"{number}-targets.html")))
        write_page(InspectConfig(path=capture, html=name, out=str(root / f"{number}-alone.html")))
    return root


@pytest.mark.parametrize("name", ["1-targets", "3-targets", "1-alone", "2-alone", "4-alone"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_conversation_loads_alone_and_fits(chats: Path, browser: Browser, name: str, width: int, dark: bool) -> None:
    browser.open(chats / f"{name}.html", width, dark=dark)
    browser.hover(".turn.assistant .tok")
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_turns_stand_in_order_and_say_who_speaks(chats: Path, browser: Browser) -> None:
    browser.open(chats / "3-targets.html")
    assert browser.texts(".turn:not(.template) .who b") == ["user", "assistant", "tool", "assistant"]
    assert browser.texts(".turn.taught .who small.taught") == ["taught", "taught"]
    assert browser.texts(".part")[0] == "tool call"
    # every token of both sides stands on the page, once, in order
    for side in "ts":
        places = browser.evaluate(f"[...document.querySelectorAll('.line.{side} .tok')].map(t => Number(t.dataset.k))")
        assert places == list(range(len(places)))
        assert len(places) > 30


def test_grey_is_what_has_no_row(chats: Path, browser: Browser) -> None:
    sample = load_sample(InspectConfig(path=str(TINY.parent / "v6-chats"), html="chats.jsonl:2#0"))
    browser.open(chats / "2-targets.html")
    grey = browser.evaluate("[...document.querySelectorAll('.line.t .tok.none')].map(t => Number(t.dataset.k))")
    assert grey == [at for at, row in enumerate(sample.row_of_token) if row < 0]
    browser.hover(".turn.user .tok")
    assert "not taught, so no row" in browser.texts(".pane.row h3")[0]
    assert "not taught, so no target" in browser.texts(".pane.target h3")[0]
    assert browser.texts("#dock .head b") == ["In no chunk"]
    # a message that is switched off is an assistant's and not taught
    assert browser.texts(".turn.assistant .who small")[1] == "not taught"


def test_a_token_of_an_answer_shows_its_own_row(chats: Path, browser: Browser) -> None:
    config = InspectConfig(
        path=str(TINY.parent / "v7-targets"), html="chats.jsonl:3#0", capture=str(TINY.parent / "v6-chats")
    )
    sample = load_sample(config)
    assert sample.rows is not None
    browser.open(chats / "3-targets.html")
    taught = [token for token, row in enumerate(sample.row_of_token) if row >= 0]
    for token in (taught[-1], taught[-3], taught[0]):
        browser.hover(f'.tok[data-side="t"][data-k="{token}"]')
        row = sample.row_of_token[token]
        at = range(*sample.rows.offsets[row : row + 2].tolist())
        wanted = [(shown(sample, int(sample.rows.ids[k])), float(sample.rows.logprob[k])) for k in at]
        close(table(browser, "row")[: len(wanted)], wanted)


def test_what_the_students_template_leaves_out_is_dashed(chats: Path, browser: Browser) -> None:
    browser.open(chats / "3-targets.html")
    browser.hover('.chunk.lost[data-kind="call"] .tok')
    assert "no target: the student's text has nothing to compare here" in browser.texts(".pane.target h3")[0]
    assert browser.texts("#dock .head b") == ["In no chunk"]


def test_keys_go_through_all_boxes_of_a_conversation(chats: Path, browser: Browser) -> None:
    browser.open(chats / "1-targets.html")
    boxes = len(browser.texts(".chunk"))
    browser.press("Tab")
    for wanted in ("1", "2"):
        browser.press("ArrowRight")
        assert browser.evaluate("document.activeElement.dataset.chunk") == wanted
    browser.press("End")
    assert browser.evaluate("document.activeElement.dataset.chunk") == str(boxes - 1)
    shaded = browser.evaluate("document.querySelectorAll('#strip rect.untaught').length")
    assert 0 < shaded < browser.evaluate("document.querySelectorAll('#strip rect.bar').length")
