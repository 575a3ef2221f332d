"""Memory that may still be taken."""

from pathlib import Path

import xtoken.schemas.io.memory as memory


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    assert memory._group_memory(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._group_memory(tmp_path) == 450
    (tmp_path / "memory.max").write_text("100\n")
    assert memory._group_memory(tmp_path) == 0


def test_memory_of_this_machine() -> None:
    """Less than all of it; Linux tells."""
    free = memory.free_memory()
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    assert free is not None
    assert 0 < free < int(lines["MemTotal"].split()[0]) << 10
