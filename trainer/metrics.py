"""metrics.jsonl: one line per optimizer step and one per evaluation, each step once however often a run resumes."""

import json
from pathlib import Path
from typing import Any


class Metrics:
    """Appends lines to a file, first cutting what lies after step ``resumed``."""

    def __init__(self, path: Path, resumed: int) -> None:
        self.path = path
        self.lines = [line for line in read_metrics(path) if line["step"] <= resumed]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(map(_line, self.lines)))
        temporary.replace(path)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line at once."""
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(_line(line))

    def evaluation(self, when: str) -> dict[str, float] | None:
        """The figures of the evaluation ``before`` or ``after`` if it has been made."""
        found = [line for line in self.lines if line.get("eval") == when]
        return {k: v for k, v in found[-1].items() if k not in ("eval", "step")} if found else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last may be torn by a crash and is then left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
