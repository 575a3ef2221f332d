"""Curves: running means, few points, seeds as bands."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from report_runs import write_run

from xtoken.trainer.report.curves import draw
from xtoken.trainer.report.groups import Group, group_runs
from xtoken.trainer.report.run_folder import read_run
from xtoken.trainer.report.series import POINTS, Curve, Panel, panels, smooth, window_of


def read(*roots: str) -> list[Group]:
    return group_runs([read_run(root) for root in roots])


def test_a_running_mean_leaves_out_what_is_no_number() -> None:
    found = smooth(np.array([1.0, 2.0, math.nan, 6.0, 8.0]), 3)
    assert list(np.isnan(found)) == [False, False, True, False, False]
    assert found[[0, 1, 3, 4]] == pytest.approx([1.5, 1.5, 7.0, 7.0])
    assert smooth(np.array([math.inf]), 1)[0] != math.inf


def test_panels_keep_losses_apart(tmp_path: Path) -> None:
    groups = read(*(write_run(tmp_path / loss, loss, steps=30) for loss in ("p-kl", "alm", "ce")))
    titles = [panel.title for panel in panels(groups, "tokens")]
    assert titles[:5] == ["KD, p-kl", "KD, alm", "CE", "objective, p-kl", "objective, alm"]
    assert titles[5:8] == ["top-1 agreement in training", "held-out text", "held-out KL to the teacher"]
    assert titles[-3:] == ["speed", "gradient norm", "learning rate"]
    ce = next(panel for panel in panels(groups, "seconds") if panel.title == "CE")
    assert [curve.group for curve in ce.curves] == [0, 1, 2]
    text = next(panel for panel in panels(groups, "tokens") if panel.title == "held-out text")
    assert text.goals == (1.41,)


def test_gradients_and_weights_of_gradmag_have_panels(tmp_path: Path) -> None:
    """Norms are measured in every tenth step and weights hold in each; other runs have neither."""
    roots = [write_run(tmp_path / name, "alm", steps=30) for name in ("mixed", "fixed")]
    file = Path(roots[0], "metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        if "loss" in line:
            line |= {"ce_weight": 1.0, "kd_weight": 40.0 + line["step"]}
            line |= {"ce_gradient": 0.5, "kd_gradient": 0.01} if line["step"] % 10 == 1 else {}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = {panel.title: panel for panel in panels(read(*roots), "tokens")}
    [weight] = drawn["weight of KD"].curves
    assert (weight.y_P[0], weight.y_P[-1]) == (41.0, 70.0)
    [norm] = drawn["gradient of KD by hidden states"].curves
    assert norm.y_P.tolist() == pytest.approx([0.01] * 3)
    assert norm.group == 0
    assert len(norm.x_P) == 3
    assert "gradient of CE by hidden states" in drawn


def test_curves_are_short_and_seeds_become_a_band(tmp_path: Path) -> None:
    roots = [write_run(tmp_path / f"{seed}", "ce", seed, steps=900, held_out=False) for seed in (0, 1)]
    groups = read(*roots)
    assert window_of(groups) == 19
    [curve] = next(panel for panel in panels(groups, "tokens") if panel.title == "CE").curves
    assert len(curve.x_P) <= POINTS
    assert np.isfinite(curve.y_P).all()
    assert curve.low_P is not None
    assert (curve.low_P < curve.y_P).mean() > 0.9
    first = groups[0].runs[0]
    expected = smooth(first.curves["ce"][1], 19), smooth(groups[0].runs[1].curves["ce"][1], 19)
    assert curve.y_P[POINTS // 2] == pytest.approx((expected[0][450] + expected[1][450]) / 2, abs=0.05)


def test_a_seed_that_stopped_early_ends_early(tmp_path: Path) -> None:
    groups = read(
        write_run(tmp_path / "0", "ce", 0, steps=400, held_out=False),
        write_run(tmp_path / "1", "ce", 1, steps=200, held_out=False, finished=False),
    )
    [curve] = next(panel for panel in panels(groups, "tokens") if panel.title == "CE").curves
    assert curve.low_P is not None
    width_P = curve.y_P - curve.low_P
    assert (width_P[: POINTS // 2 - 3] > 0).all()
    assert (width_P[POINTS // 2 + 3 :] == 0).all()


def test_evaluations_of_seeds_meet_at_their_steps(tmp_path: Path) -> None:
    groups = read(*(write_run(tmp_path / str(seed), "p-kl", seed, steps=250) for seed in (0, 1)))
    panel = next(panel for panel in panels(groups, "tokens") if panel.title == "held-out text")
    [curve] = panel.curves
    assert len(curve.x_P) == 4, "before, 100, 200, after"
    after = [run.evaluation("after") for run in groups[0].runs]
    assert curve.y_P[-1] == pytest.approx(np.mean([one.figures["bits_per_byte"] for one in after if one]))


def test_nothing_to_draw_is_no_panel(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", "ce", steps=1, held_out=False, finished=False)
    lines = [{"step": 1, "tokens": 5, "loss": math.nan, "ce": math.nan}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert panels(read(root), "tokens") == []


def test_drawings_share_no_id_and_name_no_address() -> None:
    curve = Curve(0, np.array([1.0, 2.0]), np.array([0.25, 0.375]), np.array([0.2, 0.3]), np.array([0.3, 0.4]))
    steep = Curve(1, np.array([1.0, 2.0]), np.array([0.01, 10.0]))
    plots = [
        Panel("CE", "nats", "tokens", (curve,), events=((0, 1.5),)),
        Panel("CE", "nats", "seconds", (curve, steep)),
    ]
    drawn = draw(plots, "t")
    assert drawn == draw(plots, "t"), "the same panels give the same bytes"
    ids = [name for svg in drawn for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in drawn:
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) <= set(ids)
        assert "http" not in svg
        assert "<style" not in svg
        assert "var(--c0)" in svg
        assert "currentColor" in svg
        assert not re.search(r"#0[a0-9b]{5}\b|#01020", svg), "no stand-in colour is left"
    assert re.search(r">0\.\d\d+<", drawn[0]), "labels keep their digits"
    assert "log scale" in drawn[1]
