"""A capture to an object store whose server and network misbehave ends as if they had not.

A proxy stands between the capture's processes and a real S3 server, and does to requests what its rules say; all
processes of a capture have only its address.
"""

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import s3fs
from fault_proxy import FaultProxy, Rule, faults_before, storm
from fault_runs import Run, ended, fetch, running, same_as, wait_for, workers_of
from s3_server import S3Server

from xtoken.pipeline.capture.plan import SliceReader, make_plan
from xtoken.pipeline.store.files import Folder
from xtoken.pipeline.store.publish import Figures, commit, commit_name, committed, data_name, publish_part, read_commit
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import Unreachable
from xtoken.schemas.io.remote import open_url, patiently, read_tail
from xtoken.schemas.ui.progress import Silent

ENOUGH = 20  # faults without which a storm has proved nothing
# A client gives up on a silent server after a second, so that tests end.
IMPATIENT = json.dumps({"config_kwargs": {"read_timeout": 1, "connect_timeout": 1}})


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with faults_before(s3_server.endpoint, seed=20261122) as found:
        yield found


def through(proxy: FaultProxy) -> dict[str, str]:
    """Variables by which a process sees the server through the proxy only."""
    return {**S3Server(proxy.endpoint).environment("alpha"), "FSSPEC_S3": IMPATIENT}


@pytest.fixture
def direct(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is alpha, and sees the server itself."""
    yield from become_alpha(s3_server.endpoint, monkeypatch)


@pytest.fixture
def stormy(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is alpha, and sees the server through the proxy only."""
    yield from become_alpha(proxy.endpoint, monkeypatch)


def become_alpha(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in S3Server(endpoint).environment("alpha").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    # clients are kept by what they were made with, which the environment is not part of
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def capture_of(undisturbed: PrecomputeConfig, name: str) -> PrecomputeConfig:
    return undisturbed.model_copy(update={"out": f"s3://alpha-store/{name}"})


def counted(proxy: FaultProxy) -> str:
    found = ", ".join(f"{count} {name}" for name, count in sorted(proxy.happened.items()))
    return f"{proxy.requests} requests, of which {found}"


@pytest.mark.usefixtures("direct")
def test_a_storm_of_faults_changes_nothing(undisturbed, proxy, tmp_path, figure):
    config = capture_of(undisturbed, "storm")
    proxy.rules = storm(0.2)
    Run(config, tmp_path, environment=through(proxy)).finish(seconds=300)
    proxy.rules = ()
    assert sum(proxy.happened.values()) >= ENOUGH
    assert {rule.name for rule in storm(1.0)} <= set(proxy.happened), "every kind of fault was met"
    same_as(Path(undisturbed.out), fetch(Folder(config.out), tmp_path / "fetched"))
    figure(f"storage: a capture under {counted(proxy)}: same bytes, nothing quarantined")


@pytest.mark.usefixtures("direct")
def test_an_outage_in_the_middle_changes_nothing(undisturbed, proxy, tmp_path, figure):
    config = capture_of(undisturbed, "outage")
    with running(Run(config, tmp_path, environment=through(proxy))) as process:
        wait_for(lambda: len(committed(config.out)) >= 3)
        with proxy.outage():
            before = len(committed(config.out))
            # a worker that starts while nothing is there
            os.kill(workers_of(process.pid)[0], signal.SIGKILL)
            wait_for(lambda: len(workers_of(process.pid)) == 2, 120)
            with pytest.raises(AssertionError):
                wait_for(lambda: process.poll() is not None, 12)
            assert len(committed(config.out)) == before
        ended(process)
    same_as(Path(undisturbed.out), fetch(Folder(config.out), tmp_path / "fetched"))
    figure(f"storage: 12 s without a server after {before} parts, a worker killed meanwhile: same bytes")


@pytest.mark.usefixtures("direct")
def test_an_outage_while_the_manifest_is_written_is_waited_for(undisturbed, proxy, tmp_path):
    config = capture_of(undisturbed, "end")
    proxy.rules = [Rule("503", method="PUT", path="/end/manifest.json", most=12)]
    Run(config, tmp_path, environment=through(proxy)).finish()
    assert proxy.happened == {"503 before": 12}
    same_as(Path(undisturbed.out), fetch(Folder(config.out), tmp_path / "fetched"))


def no_check(url: str) -> Figures:
    with open_url(url) as file:
        return Figures(1, 1, 1, 1, len(file.read()))


class Writer:
    """Writes so many bytes, and counts how often."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls = 0

    def __call__(self, url: str) -> dict[str, int]:
        self.calls += 1
        folder, _, name = url.rpartition("/")
        Folder(folder).replace(name, b"x" * self.size)
        return {}


@pytest.mark.usefixtures("stormy")
@pytest.mark.parametrize("kind", ["500", "503", "reset"])
def test_an_answer_that_is_lost_is_no_duplicate(proxy, s3_server, kind):
    """The put of a part, or of its record, works; the answer is lost; the client's second try meets its own file."""
    root = f"s3://alpha-store/lost-{kind}"
    for index, path in enumerate((data_name(0), commit_name(1))):
        proxy.happened.clear()
        proxy.rules = [Rule(kind, after=True, method="PUT", path=path, most=1)]
        part = publish_part(root, index, Writer(1000), no_check)
        assert proxy.happened == {f"{kind} after": 1}
        proxy.rules = ()
        assert read_commit(Folder(root), index) == part
        there = s3_server.filesystem("alpha").ls(f"{root}/data", detail=False)
        assert len(there) == index + 1, there


@pytest.mark.usefixtures("stormy")
def test_a_record_that_was_ours_stands_when_its_answer_is_lost(proxy):
    folder = Folder("s3://alpha-store/ours")
    ours = publish_part("s3://alpha-store/other", 0, Writer(10), no_check)
    proxy.rules = [Rule("reset", after=True, method="PUT", path="/ours/commits", most=1)]
    assert commit(folder, ours) == ours
    proxy.rules = ()
    assert commit(folder, ours.model_copy(update={"sha256": "f" * 64})) == ours


@pytest.mark.usefixtures("stormy")
def test_an_answer_that_is_lost_is_no_error_where_the_folder_was_listed_before(proxy):
    """The client keeps listings, and that one lacks the file which the lost put wrote."""
    folder = Folder("s3://alpha-store/listed")
    assert folder.create("first.json", b"{}")
    assert folder.names() == ["first.json"]
    proxy.rules = [Rule("reset", after=True, method="PUT", path="/listed/plan.json", most=1)]
    assert not folder.create("plan.json", b"{}")
    assert proxy.happened == {"reset after": 1}


@pytest.mark.usefixtures("stormy")
def test_a_part_that_cannot_be_read_just_now_is_not_called_bad(proxy, s3_server, monkeypatch):
    """Two attempts at one part: the second meets the first one's file while the server fails."""
    root = "s3://alpha-store/twins"
    monkeypatch.setattr("xtoken.pipeline.store.publish.patiently", partial(patiently, seconds=0.0))
    first = publish_part(root, 0, Writer(1000), no_check)
    Folder(root).remove(commit_name(0))  # it is about to be written
    proxy.rules = [Rule("503", method="GET", path=data_name(0)), Rule("503", method="HEAD", path=data_name(0))]
    with pytest.raises(Unreachable):
        publish_part(root, 0, Writer(1000), no_check)
    proxy.rules = ()
    names = [name.rsplit("/", 1)[-1] for name in s3_server.filesystem("alpha").ls(f"{root}/data", detail=False)]
    assert names == ["part-00000.parquet"]
    assert commit(Folder(root), first) == first


@pytest.mark.usefixtures("stormy")
def test_what_was_computed_outlives_an_outage(proxy):
    writer = Writer(1000)
    proxy.rules = [Rule("reset", path="/patient/", most=25)]
    publish_part("s3://alpha-store/patient", 0, writer, no_check)
    assert proxy.happened == {"reset before": 25}


@pytest.mark.usefixtures("stormy")
@pytest.mark.parametrize("kind", ["truncated", "503"])
def test_a_corpus_that_cannot_be_read_just_now_is_not_a_bad_one(undisturbed, proxy, tmp_path, kind):
    """A file that breaks off on its way here holds what it holds: nothing of it may be skipped as bad."""
    Folder("s3://alpha-store/corpus").replace("corpus.jsonl", Path(undisturbed.corpus.corpus).read_bytes())
    remote = {"corpus": "s3://alpha-store/corpus/corpus.jsonl", "on_bad": "skip"}
    config = undisturbed.changed(**remote)
    proxy.rules = [Rule(kind, method="GET", path="/corpus.jsonl")]
    with pytest.raises(Unreachable, match=r"corpus\.jsonl"):
        make_plan(config.corpus, config.run.shard_bytes, Silent())
    proxy.rules = []
    plan = make_plan(config.corpus, config.run.shard_bytes, Silent())
    assert plan.corpus.bad == {}
    proxy.rules = [Rule(kind, method="GET", path="/corpus.jsonl")]
    with pytest.raises(Unreachable, match=r"corpus\.jsonl"):
        SliceReader(config.corpus, plan).read(plan.shards[3])


@pytest.mark.usefixtures("stormy")
@pytest.mark.parametrize(
    ("kind", "passing"), [("500", True), ("503", True), ("reset", True), ("truncated", True), ("refused", False)]
)
def test_errors_that_may_pass_say_so(proxy, kind, passing):
    url = "s3://alpha-store/kinds/x"
    Folder("s3://alpha-store/kinds").replace("x", b"1" * 1000)
    if kind == "refused":
        with pytest.raises(Exception, match="beta-store") as caught:
            Folder("s3://beta-store/kinds").read("x")
    else:
        proxy.rules = [Rule(kind, method="GET")] if kind == "truncated" else [Rule(kind)]
        with pytest.raises(Unreachable, match=r"kinds/x.*AWS_ENDPOINT_URL_S3") as caught:
            read_tail(url)
    assert isinstance(caught.value, Unreachable) == passing
