"""One sample as a page: text with the teacher's tokens above and the student's below, rows beside targets."""

import math
import re
from typing import Any

from xtoken.pipeline.html.frame import asset, document, facts, short
from xtoken.pipeline.html.visible import plain, visible
from xtoken.pipeline.page.data import sample_data
from xtoken.pipeline.page.sample import Sample, load_sample
from xtoken.pipeline.store.codecs import open_codec
from xtoken.pipeline.store.files import Folder
from xtoken.schemas.configs.artifacts import InspectConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.markup import escaped

_LONGEST_NAME = 80
# Bits of surprise at which the next colour begins; the script and the style sheet have one colour each.
EDGES = (0.5, 1, 2, 4, 8, 16)


def write_page(config: InspectConfig) -> dict[str, Any]:
    """Draw the sample that ``config.html`` names; returns what was drawn and where the page lies.

    Raises:
        XtokenError: there is no such sample, or it cannot be drawn (see ``load_sample``), or written.
    """
    sample = load_sample(config)
    page = sample_page(sample).encode()
    out = config.out or file_name(sample.row["sample_id"])
    folder, name = out.rpartition("/")[::2]
    place = Folder(folder or ("/" if out.startswith("/") else "."))
    if not name or (place.exists(name) and name in place.names() and name not in place.sizes()):
        raise XtokenError(f"--out {out} is a folder; name the page in it, such as {out.rstrip('/')}/page.html")
    place.make("")
    place.replace(name, page)
    return {**figures(sample), "page_bytes": len(page), "page": out}


def file_name(sample_id: str) -> str:
    """A name that any file system takes."""
    return (re.sub(r"[^\w.-]+", "-", sample_id).strip(".-")[:_LONGEST_NAME] or "sample") + ".html"


def figures(sample: Sample) -> dict[str, Any]:
    """What the head of the page says, as numbers; what is not there is left out."""
    row, targets = sample.row, sample.targets
    size, taught = row["teacher_end"][-1], sample.taught_bytes
    shown = {"sample_id": row["sample_id"], "teacher": sample.manifest.teacher.model}
    if targets is not None:
        shown["student"] = targets.manifest.student.name
    shown |= {"bytes": size, "teacher_tokens": len(row["teacher_ids"])}
    if sample.is_chat:
        answers = {message for message, learn in zip(row["span_message"], row["span_learn"], strict=True) if learn}
        shown |= {"turns": len(answers), "taught_bytes": taught, "taught_tokens": len(row["realised_logprob"])}
    if targets is not None:
        chunks, one_to_one = _chunks(targets.row, gaps=not sample.is_chat)
        shown |= {"student_tokens": len(targets.row["student_ids"]), "chunks": chunks}
        shown["one_to_one"] = round(one_to_one / max(chunks, 1), 4)
    if taught and row["realised_logprob"] and not any(map(math.isnan, row["realised_logprob"])):
        shown["bits_per_byte"] = round(-math.fsum(row["realised_logprob"]) / math.log(2) / taught, 4)
    return shown


def _chunks(row: dict[str, Any], *, gaps: bool) -> tuple[int, int]:
    """How many chunks there are, with those without a target or not, and those of one token on either side."""
    count, single, before = 0, 0, (0, 0)
    for *ends, nats in zip(row["chunk_student_end"], row["chunk_teacher_end"], row["teacher_logprob"], strict=True):
        if gaps or not math.isnan(nats):
            count += 1
            single += tuple(ends) == (before[0] + 1, before[1] + 1)
        before = ends[0], ends[1]
    return count, single


def sample_page(sample: Sample) -> str:
    """The whole page."""
    shown = figures(sample)
    # an id is untrusted text like any other
    name = plain(visible(shown["sample_id"].encode())).replace("·", " ")
    student = f", student {short(shown['student'])}" if "student" in shown else ""
    heading = (
        f"<header><h1>{escaped(name)}</h1>"
        f"<p class=note>Teacher {escaped(short(shown['teacher']))}{escaped(student)}.{escaped(_remarks(sample))}</p>"
        f"{facts(_facts(shown))}</header>"
    )
    words = "tokens" if sample.targets is None else "chunks"
    body = (
        f"<main>{heading}"
        '<section><h2>Bits per byte along the sample</h2><div id="strip"></div></section>'
        f'<section><h2>Text</h2><p class=note id="how">{_how(sample)}</p>'
        f'<div id="legend"></div><div id="flow" role="group" aria-label="{words} of the sample"></div></section>'
        "<noscript><p>This page is drawn by the script in it; nothing is loaded.</p></noscript></main>"
        '<aside id="dock" aria-label="rows and targets"></aside>'
    )
    data = {**sample_data(sample), "edges": EDGES, "bytes": shown["bytes"], "bpb": shown.get("bits_per_byte")}
    script = f"(() => {{'use strict';\n{_asset('sample.js')}{_asset('sample_tables.js')}start();\n}})();"
    return document(f"{name} - xtoken", body, _asset("sample.css"), script=script, data=data)


def _facts(shown: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [(f"{shown['bytes']:,}", "bytes"), (f"{shown['teacher_tokens']:,}", "teacher tokens")]
    if "turns" in shown:
        facts.insert(0, (f"{shown['turns']:,}", "turns taught"))
        facts.append((f"{shown['taught_tokens'] / shown['teacher_tokens']:.1%}", "of them taught"))
    if "student" in shown:
        facts += [(f"{shown['student_tokens']:,}", "student tokens"), (f"{shown['chunks']:,}", "chunks")]
        facts.append((f"{shown['one_to_one']:.1%}", "of chunks are 1-1"))
    if "bits_per_byte" in shown:
        facts.append((f"{shown['bits_per_byte']:.3f}", "bits per byte"))
    return facts


def _remarks(sample: Sample) -> str:
    """What is not as usual."""
    row, targets = sample.row, sample.targets
    remarks = {
        "The text was not stored; it is put together from the tokens' bytes.": row["text"] is None,
        "The rows were left out of this subset.": sample.rows is None,
        "Some ends were moved up to a safe byte.": row["snapped"],
    }
    if (remark := open_codec(sample.manifest.codec).remark) is not None:
        remarks[remark] = True
    if targets is not None and targets.manifest.tau != 1:
        remarks[f"Targets are at temperature {targets.manifest.tau:g}, rows at 1."] = True
    return "".join(f" {words}" for words, true in remarks.items() if true)


def _how(sample: Sample) -> str:
    chat = " Grey is read, not taught: it has no row. Small rows between turns are what a chat template writes."
    return _boxes(sample) + (chat if sample.is_chat else "")


def _boxes(sample: Sample) -> str:
    one = "token" if sample.targets is None else "chunk"
    keys = f"Point at a token, or take the arrow keys: left and right go from {one} to {one}"
    last = "Enter holds what is shown, Esc lets go."
    if sample.targets is None:
        return f"Each box is a token of the teacher, coloured by how it surprised. {keys}. {last}"
    return (
        "Each box is a chunk: the teacher's tokens above, coloured by how they surprised, the text, the student's "
        f"tokens below. Strong borders are chunks of several tokens. {keys}, up and down within one. {last}"
    )


def _asset(name: str) -> str:
    return asset(name, "xtoken.pipeline.page")
