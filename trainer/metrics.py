"""metrics.jsonl: one line per optimizer step and one per evaluation, each step once however often a run resumes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtoken.schemas.io.atomic import write_text
from xtoken.trainer.record import read_lines


class Metrics:
    """The lines of a run so far; only the rank that ``writes`` appends them to the file."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.lines = read_metrics(path)

    def back_to(self, step: int, left_out: Sequence[int]) -> None:
        """Cut what lies after ``step``, and rollbacks that no checkpoint counts: they will be written again."""
        counts = (None, *left_out)
        self.lines = [line for line in self.lines if line["step"] <= step and line.get("left_out") in counts]
        if not self.writes:
            return
        write_text(self.path, "".join(map(_line, self.lines)))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line at once."""
        self.lines.append(line)
        if not self.writes:
            return
        with open(self.path, "a") as file:
            file.write(_line(line))

    def evaluation(self, when: str, step: int | None = None) -> dict[str, Any] | None:
        """The figures of the evaluation ``before`` or ``after``, or of a ``step``, if it has been made."""
        found = [line for line in self.lines if line.get("eval") == when and step in (None, line["step"])]
        return {k: v for k, v in found[-1].items() if k not in ("eval", "step")} if found else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; see ``read_lines``."""
    return read_lines(path, "step", int)


def _line(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
