"""Killing a capture at any moment and running it again gives what an undisturbed run gives, byte for byte."""

import os
import random
import signal
from pathlib import Path

import pytest
from fault_runs import Run, commits, ended, files, group_lives, orphans, running, same_as, wait_for, workers_of

KILLS = 10


def test_kill_9_at_ten_random_moments(undisturbed, tmp_path, figure):
    config = undisturbed
    parts = len(files(Path(config.out)))
    moments = random.Random(20260521)
    kills = rounds = 0
    committed_at_kill = []
    left = 0
    while kills < KILLS:
        rounds += 1
        assert rounds < 6 * KILLS
        out = tmp_path / f"out-{rounds}"
        run = Run(config.model_copy(update={"out": str(out)}), tmp_path)
        # a few kills per folder, so that resumed runs are killed too
        for _ in range(4):
            # at a point of the work rather than of the clock: how fast this machine is must not decide what is hit;
            # a point that an earlier run has passed is a moment while the program starts
            if kills < KILLS and run.kill_at(moments.randrange(parts), moments.uniform(0.0, 0.4)):
                kills += 1
                committed_at_kill.append(len(commits(out)))
                left += len(orphans(out)) if out.exists() else 0
        run.finish()
        same_as(Path(config.out), out)
    figure(
        f"capture: {kills} x kill -9 with {committed_at_kill} of {parts} parts committed, {rounds} runs, "
        f"{left} temporary files left and cleaned, same bytes"
    )


def test_killing_workers_costs_nothing(undisturbed, tmp_path, figure):
    out = tmp_path / "out"
    killed: list[int] = []
    with running(Run(undisturbed.model_copy(update={"out": str(out)}), tmp_path)) as process:
        for at in (1, 3, 5):
            wait_for(lambda at=at: len(commits(out)) >= at)
            wait_for(lambda: set(workers_of(process.pid)) - set(killed))
            victim = min(set(workers_of(process.pid)) - set(killed))
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
        ended(process)
    same_as(Path(undisturbed.out), out)
    figure(f"capture: {len(killed)} workers killed with -9 in one run, which ended by itself with the same bytes")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_and_resumes(undisturbed, tmp_path, number):
    out = tmp_path / "out"
    run = Run(undisturbed.model_copy(update={"out": str(out)}), tmp_path)
    with running(run) as process:
        wait_for(lambda: commits(out))
        os.killpg(process.pid, number)  # as a terminal does: driver and workers alike
        ended(process, -signal.SIGINT if number == signal.SIGINT else 128 + signal.SIGTERM, 180)
        wait_for(lambda: not group_lives(process.pid), 120)  # multiprocessing's own helper notices a moment later
    assert not list(out.rglob("*.tmp"))
    run.finish()
    same_as(Path(undisturbed.out), out)
