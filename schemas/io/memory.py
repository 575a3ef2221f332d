"""How much memory of the host may still be taken."""

from pathlib import Path


def free_memory() -> int | None:
    """Bytes of memory that may still be taken, here and in this container; None where the system does not tell."""
    limits = [_machine_memory(), _group_memory()]
    return min((free for free in limits if free is not None), default=None)


def _machine_memory() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def _group_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group (version 2) leaves; what the system caches for it counts as free."""
    try:
        most, now = (int((root / name).read_text()) for name in ("memory.max", "memory.current"))
        details = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return max(0, most - now + int(details["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no group, or "max": no limit
        return None
