"""Is the root target of byte-prefix where the student's own tokens would begin?

The exact target at a chunk's start is q*(u), the probability that the student's encoding of the teacher's continuation
begins with u. It is enumerated: the teacher goes on token by token until every tokenization that the student could
still write begins with the same token. The root target asks less: it takes, for each teacher token t alone, phi(t), the
token that the student's own encoding of t begins with; what follows t may change that. Beside it the longest student
token that t starts with, which was phi before: BPE may forbid it (12, 2 where 122 is a token).

    python -m benchmarks.prefix_exact          # writes benchmarks/results/prefix_exact.{json,md}
"""

import argparse
import copy
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xtoken.pipeline.tokens import TokenTable, load_tokenizer
from xtoken.pipeline.tokens.canonical import Canonical
from xtoken.trainer.ensemble.covers import SortedTokens

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXT = ROOT / "examples" / "data" / "moby-dick-held-out.jsonl"
TEACHER = ROOT / ".cache" / "models" / "gemma-3-270m"
STUDENTS = {
    "SmolLM2-135M": ROOT / ".cache" / "models" / "smollm2-135m",
    "Llama-3": ROOT / ".cache" / "tokenizers" / "llama3",
}
LEAST, ENOUGH, LONGEST = 3e-4, 1e-2, 6
NONE = -1  # no token of the student's: control tokens of the teacher other than its ends
_MANY = 64  # longer tokens that go on from given bytes: some of them will be right
Expand = Callable[[list[tuple[int, ...]]], list[np.ndarray]]  # P of the next token behind each sequence


class FirstToken:
    """What the student's encoding of bytes begins with, once nothing that follows can change it."""

    def __init__(self, canonical: Canonical) -> None:
        self.canonical = canonical
        self.tokens = SortedTokens(canonical.token_bytes, len(canonical.token_bytes))
        self._known: dict[bytes, int | None] = {}

    def of(self, data: bytes) -> int | None:
        """The first token of every tokenization that covers ``data``; None while there are several."""
        if data not in self._known:
            found = self.all(data)
            self._known[data] = next(iter(found)) if len(found) == 1 else None
        return self._known[data]

    def all(self, data: bytes, most: int = 2) -> set[int]:
        """First tokens of all tokenizations that cover ``data``; the search ends at ``most``."""
        longer = self._longer((), data)
        found = set(longer[:most])
        for token, length in reversed(self._shorter((), data)):
            if len(found) >= most:
                break
            if self._reaches((token,), data[length:]):
                found.add(token)
        return found

    def _reaches(self, ids: tuple[int, ...], rest: bytes) -> bool:
        """Whether viable tokens that go on from ``ids`` cover ``rest``."""
        if not rest or self._longer(ids, rest):
            return True
        return any(self._reaches((*ids, token), rest[length:]) for token, length in reversed(self._shorter(ids, rest)))

    def _longer(self, ids: tuple[int, ...], rest: bytes) -> list[int]:
        """Viable tokens that begin with ``rest`` and go on."""
        splits = self.tokens.splits(rest)
        tokens: list[int] = self.tokens.id_M[splits[0] : splits[-1]].tolist()
        if len(tokens) > _MANY:
            return tokens
        return self._viable(ids, tokens)

    def _shorter(self, ids: tuple[int, ...], rest: bytes) -> list[tuple[int, int]]:
        """Viable tokens that ``rest`` begins with, and their lengths, shortest first."""
        found = []
        for length in range(1, len(rest) + 1):
            # the bytes of no token go on from here: longer ones need not be looked for
            splits = self.tokens.splits(rest[:length])
            found += [(int(self.tokens.id_M[at]), length) for at in self.tokens.spelling(rest[:length])]
            if splits[0] == splits[-1]:
                break
        may = set(self._viable(ids, [token for token, _ in found]))
        return [(token, length) for token, length in found if token in may]

    def _viable(self, ids: tuple[int, ...], tokens: list[int]) -> list[int]:
        if not tokens:
            return []
        return [token for token, may in zip(tokens, self.canonical.viable(ids, tokens), strict=True) if may]


@dataclass
class Found:
    """Mass of continuations whose first student token is settled.

    Attributes:
        joint: by the teacher's first token and the student's first token.
        unsettled: mass of all others.
    """

    joint: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    unsettled: float = 0.0

    def exact(self) -> dict[int, float]:
        """q* of each student token, as far as it is settled."""
        mass: dict[int, float] = defaultdict(float)
        for (_, u), p in self.joint.items():
            mass[u] += p
        return dict(mass)


def enumerate_first(
    expand: Expand,
    teacher: TokenTable,
    first: FirstToken,
    *,
    least: float,
    enough: float,
    most: int,
    longest: int,
) -> Found:
    """Follow the teacher's continuations, most probable first, until the student's first token is settled.

    Args:
        expand: the teacher behind the text so far.
        teacher: its tokens.
        first: the student's side.
        least: continuations of no more mass than this stay unsettled.
        enough: the search ends where the others that are left have no more mass together.
        most: continuations followed at each length.
        longest: teacher tokens that are followed.
    """
    found, pieces = Found(), teacher.pieces()
    ends = {at for at, role in enumerate(teacher.role) if role in ("eos", "eot")}
    nodes: list[tuple[tuple[int, ...], bytes, float]] = [((), b"", 1.0)]
    for _ in range(longest):
        nodes.sort(key=lambda node: -node[2])
        followed = [node for node in nodes[:most] if node[2] > least]
        if sum(node[2] for node in followed) <= enough:
            break
        found.unsettled += sum(node[2] for node in nodes[len(followed) :])
        nodes = []
        for (ids, data, mass), p_U in zip(followed, expand([node[0] for node in followed]), strict=True):
            kept = np.flatnonzero(mass * p_U > least).tolist()
            found.unsettled += mass * max(0.0, 1 - float(p_U[kept].sum()))
            for token in kept:
                piece, share = pieces[token], mass * float(p_U[token])
                origin = ids[0] if ids else token
                if token in ends:
                    found.joint[origin, _ended(first, data)] += share
                elif not piece:
                    found.joint[origin, NONE] += share
                elif (u := _settled(first, data, piece)) is not None:
                    found.joint[origin, u] += share
                else:
                    nodes.append(((*ids, token), data + piece, share))
    found.unsettled += sum(node[2] for node in nodes)
    return found


def _ended(first: FirstToken, data: bytes) -> int:
    """The first token of a text that ends here: END is a token that every student has."""
    try:
        ids = first.canonical.encode(first.canonical.lead + data)
    except UnicodeDecodeError:
        return NONE
    return ids[0] if ids else -2


def _settled(first: FirstToken, data: bytes, piece: bytes) -> int | None:
    """The first token, after as few bytes as settle it: many continuations share them."""
    for length in range(1, len(piece) + 1):
        u = first.of(data + piece[:length])
        if u is not None:
            return u
    return None


def longest_prefix(teacher: TokenTable, student: TokenTable) -> Callable[[int], int]:
    """The longest student token that a teacher token starts with"""
    pieces, by_bytes = teacher.pieces(), student.by_bytes()

    def phi(token: int) -> int:
        data = pieces[token]
        if not data:
            return -2 if teacher.role[token] in ("eos", "eot") else NONE
        lengths = range(len(data), 0, -1)
        return next((by_bytes[data[:length]] for length in lengths if data[:length] in by_bytes), NONE)

    return phi


def own_first(teacher: TokenTable, canonical: Canonical, longest: Callable[[int], int]) -> Callable[[int], int]:
    """phi as align has it: the first token of the student's own encoding of a teacher token."""
    first_U = canonical.first_tokens(teacher.pieces())
    return lambda token: longest(token) if first_U[token] < 0 else first_U[token]


def compare(found: Found, rule: Callable[[int], int]) -> dict[str, float]:
    """A rule for teacher tokens beside q*, over the settled mass of a position.

    Returns:
        Masses: ``moved`` is on another token than q* has it; ``nowhere`` on tokens where q* has nothing; ``variation``,
        half the sum of the differences.
    """
    root: dict[int, float] = defaultdict(float)
    moved = 0.0
    for (token, u), p in found.joint.items():
        to = rule(token)
        root[to] += p
        moved += p if to != u else 0.0
    exact = found.exact()
    apart = sum(abs(root.get(u, 0.0) - exact.get(u, 0.0)) for u in root.keys() | exact.keys())
    nowhere = sum(p for u, p in root.items() if u not in exact)
    return {"moved": moved, "nowhere": nowhere, "variation": apart / 2}


class Teacher:
    """The model behind a text: P of the next token after several continuations at once, each computed once."""

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.size = model, size
        self.cache: Any = None
        self.known: dict[tuple[int, ...], np.ndarray] = {}

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> None:
        """Begin behind a text."""
        output = self.model(input_ids=torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
        self.cache, self.known = output.past_key_values, {(): self._p(output.logits[:, -1])[0]}

    @torch.no_grad()
    def expand(self, rows: list[tuple[int, ...]]) -> list[np.ndarray]:
        """See ``Expand``; all of one length."""
        new = [row for row in rows if row not in self.known]
        if new:
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(new))
            output = self.model(input_ids=torch.tensor(new), past_key_values=cache, use_cache=True, logits_to_keep=1)
            self.known |= zip(new, self._p(output.logits[:, -1]), strict=True)
        return [self.known[row] for row in rows]

    def _p(self, logits: torch.Tensor) -> np.ndarray:
        return np.asarray(logits[:, : self.size].double().softmax(-1).numpy())


def positions(teacher: Any, students: Sequence[Any], text: str, count: int) -> tuple[list[int], list[int]]:
    """The teacher's tokens of a text, and how many of them stand before evenly chosen chunk starts of all students."""
    ours = teacher.encode(text, complete=False)
    shared = np.ones(len(ours.ids), bool)
    for student in students:
        shared &= np.isin(ours.ends, student.encode(text, complete=False).ends)
    starts = np.flatnonzero(shared[:-1]) + 1
    starts = starts[starts >= 8]
    return ours.ids.tolist(), starts[np.unique(np.linspace(0, len(starts) - 1, count, dtype=int))].tolist()


class Student:
    """A tokenizer beside the teacher's, and the rules that are compared for it."""

    def __init__(self, source: Path, teacher: TokenTable) -> None:
        self.tokenizer = load_tokenizer(str(source))
        canonical = Canonical(self.tokenizer)
        self.first, longest = FirstToken(canonical), longest_prefix(teacher, self.tokenizer.table)
        self.rules = {"root": own_first(teacher, canonical, longest), "longest": longest}

    def figures(self, expand: Expand, teacher: TokenTable, most: int) -> dict[str, float]:
        """Of one position."""
        found = enumerate_first(expand, teacher, self.first, least=LEAST, enough=ENOUGH, most=most, longest=LONGEST)
        compared = {rule: compare(found, function) for rule, function in self.rules.items()}
        shares = {f"{rule}_{name}": value for rule, values in compared.items() for name, value in values.items()}
        return {"unsettled": found.unsettled, **shares}


def measure(texts: dict[str, str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each student and kind of text; the students share the teacher's forward passes."""
    from transformers import AutoModelForCausalLM

    teacher, start = load_tokenizer(str(TEACHER)), time.monotonic()
    model = Teacher(AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval(), teacher.table.size)
    students = {name: Student(source, teacher.table) for name, source in STUDENTS.items()}
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for kind, ids, place in in_turn(teacher, [student.tokenizer for student in students.values()], texts, options):
        if time.monotonic() - start > 60 * options.minutes:
            break
        model.read([int(teacher.table.info.bos_id or 0), *ids[:place]])
        for name, student in students.items():
            found[name, kind].append(student.figures(model.expand, teacher.table, options.most))
            sys.stderr.write(f"{time.monotonic() - start:.0f} s {kind} {place} {name} {found[name, kind][-1]}\n")
    return [{"student": name, "text": kind} | shares(rows) for (name, kind), rows in sorted(found.items())]


def in_turn(
    teacher: Any, students: Sequence[Any], texts: dict[str, str], options: argparse.Namespace
) -> list[tuple[str, list[int], int]]:
    """Chunk starts in an order of which every beginning is spread over all texts: kind, teacher's tokens, place."""
    found = []
    for kind, text in texts.items():
        ids, places = positions(teacher, students, text, options.positions)
        order = np.random.default_rng(0).permutation(len(places)).tolist()
        found += [(at, kind, ids, places[one]) for at, one in enumerate(order)]
    return [(kind, ids, place) for _, kind, ids, place in sorted(found, key=lambda one: one[0])]


def shares(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Sums over positions as shares of the settled mass, ``unsettled`` of all."""
    sums = {name: sum(row[name] for row in rows) for name in rows[0]}
    unsettled = sums.pop("unsettled")
    settled = len(rows) - unsettled
    means = {name: value / settled for name, value in sums.items()}
    return {"positions": len(rows), "unsettled": unsettled / len(rows), **means}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = ["student", "text", "positions", "unsettled"]
    names += [f"{rule}_{figure}" for rule in ("root", "longest") for figure in ("moved", "nowhere", "variation")]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * 3 + "|---:" * 7 + "|"]
    for row in rows:
        cells = [f"{row[name]:.2%}" if isinstance(row[name], float) else str(row[name]) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all pairs and write the results."""
    from benchmarks.machine import machine, machine_line

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=150, help="chunk starts of each text, at most")
    parser.add_argument("--minutes", type=float, default=10, help="after which no further one is begun")
    parser.add_argument("--most", type=int, default=32, help="continuations followed at each length")
    options = parser.parse_args()
    prose = str(json.loads(TEXT.read_text(encoding="utf-8").splitlines()[0])["text"])[:1500]
    counts = [f"In {1800 + 7 * i} there were {i * i * 379 + 1234} whales and {3 * i}.5 casks." for i in range(30)]
    rows = measure({"prose": prose, "numbers": " ".join(counts)}, options)
    (RESULTS / "prefix_exact.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    text = [
        "# The root target of byte-prefix beside the exact one",
        (__doc__ or "").split("\n\n")[1].strip(),
        "Teacher Gemma-3-270m; of the students only the tokenizers are used. Shares of the settled mass, over all "
        "chunk starts: *moved* lies on another token than the exact target has it on, *nowhere* on tokens to which the "
        "exact target gives nothing, *variation* is the total variation. Longest: the same with the longest "
        f"student token that t starts with. Continuations of at least {LEAST:g} are followed, the "
        f"{options.most} most probable at each length; *unsettled* is the mass of the others.",
        table(rows),
        machine_line(),
    ]
    (RESULTS / "prefix_exact.md").write_text("\n\n".join(text) + "\n")
    sys.stdout.write("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
