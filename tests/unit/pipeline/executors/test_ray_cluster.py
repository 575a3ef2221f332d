"""What a worker takes of a cluster, and what is said where there is none."""

import sys

import pytest

from xtoken.pipeline.executors.ray_cluster import Node, Share, import_ray, joined, share_of
from xtoken.schemas.errors import XtokenError


def nodes(*sizes):
    return [Node(str(index), f"host{index}", cpus, gpus) for index, (cpus, gpus) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "workers", "cpus"),
    [
        ([(8, 0)], None, 8),
        ([(8, 0)], 3, 2),
        ([(8, 0)], 20, 1),
        ([(4, 0), (4, 0), (4, 0)], 1, 4),  # all of it is of one machine
        ([(5, 0), (3, 0), (4, 0)], 4, 2),  # with 3 there would be a place for three only
        ([], 4, 1),
    ],
)
def test_without_gpus_workers_share_the_cpus(sizes, workers, cpus):
    assert share_of(nodes(*sizes), workers, None, 1, "auto") == Share(cpus, 0.0)


def test_with_gpus_a_worker_has_as_many_as_share_its_teacher():
    cluster = nodes((16, 8), (16, 8), (4, 0))
    assert share_of(cluster, None, None, 1, "auto") == Share(1, 1.0)
    assert share_of(cluster, None, None, 4, "auto") == Share(1, 4.0)
    assert share_of(cluster, 4, None, 4, "cpu") == Share(8, 0.0)
    assert share_of(cluster, None, 0.5, 1, "auto") == Share(1, 0.5)
    assert share_of(cluster, 3, 0, 1, "auto") == Share(8, 0.0)


def test_places_are_counted_machine_by_machine():
    cluster = nodes((16, 3), (16, 4), (1, 8), (8, 0))
    assert Share(1, 1.0).places(cluster) == 3 + 4 + 1
    assert Share(1, 2.0).places(cluster) == 1 + 2 + 1
    assert Share(1, 0.5).places(cluster) == 6 + 8 + 1
    assert Share(4, 0.0).places(cluster) == 4 + 4 + 0 + 2


def test_a_worker_larger_than_any_machine_is_refused():
    with pytest.raises(XtokenError, match=r"needs 8 GPUs of one node, and the largest .* has 4 \(on host1\); use a sm"):
        share_of(nodes((8, 2), (8, 4), (8, 4)), None, None, 8, "auto")
    with pytest.raises(XtokenError, match=r"needs 1 GPUs of one node, .* has none"):
        share_of(nodes((8, 0)), None, 1.0, 1, "auto")


def test_without_ray_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(XtokenError, match=r"pip install 'xtoken\[ray\]'"):
        import_ray()


def test_a_name_that_nobody_knows_is_refused_at_once():
    with (
        pytest.raises(XtokenError, match=r"--ray nowhere\.invalid:6379: nothing answers there"),
        joined("nowhere.invalid:6379", 1),
    ):
        pass
