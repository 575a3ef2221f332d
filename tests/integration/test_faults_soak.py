"""The short form of benchmarks/soak.py: ten kills on each executor."""

import pytest
from fault_soak import Found, Soak, machines

KILLS = 5


def said(where: str, found: Found) -> str:
    kills = ", ".join(f"{count} {kind}s" for kind, count in sorted(found.kills.items()))
    return (
        f"soak ({where}): kill -9 of {kills}, with {found.in_flight} shards in flight; {found.resumes} resumes, "
        f"{found.orphans} temporary files left and cleaned, {found.runs} captures with the same bytes"
    )


def test_killing_on_this_machine(undisturbed, tmp_path, figure):
    found = Soak(undisturbed, tmp_path / "soak", seed=20261122).run(KILLS, seconds=400)
    assert sum(found.kills.values()) == KILLS
    assert found.in_flight > 0
    figure(said("local", found))


def test_killing_on_ray(undisturbed, tmp_path, figure):
    pytest.importorskip("ray")
    with machines() as nodes:
        found = Soak(undisturbed, tmp_path / "soak", seed=20261123, nodes=nodes).run(KILLS, seconds=400)
    assert sum(found.kills.values()) == KILLS
    assert found.in_flight > 0
    figure(said("ray", found))
