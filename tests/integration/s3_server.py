"""A real S3-compatible server for tests: SeaweedFS on free ports of this machine, with three users.

Users, each with keys of the same name: ``admin``; ``alpha``, who owns the bucket alpha-store; ``beta``, who owns
beta-store and may read alpha-store. Ready after some four seconds.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs
from free_ports import free_ports

USERS = ("admin", "alpha", "beta")
BUCKETS = ("alpha-store", "beta-store")
_PORTS = ("master", "volume", "filer", "s3")
_READY_SECONDS = 180
_STOP_SECONDS = 3


def _rights(bucket: str, *actions: str) -> list[str]:
    return [f"{action}:{bucket}" for action in actions]


_OWNER = ("Read", "List", "Write", "Tagging")
_ACTIONS = {
    "admin": ["Admin", *_OWNER],
    "alpha": _rights("alpha-store", *_OWNER),
    "beta": [*_rights("beta-store", *_OWNER), *_rights("alpha-store", "Read", "List")],
}


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str

    def environment(self, user: str) -> dict[str, str]:
        """Variables by which any S3 client of a process becomes that user."""
        return {
            "AWS_ACCESS_KEY_ID": user,
            "AWS_SECRET_ACCESS_KEY": f"{user}-secret",
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def filesystem(self, user: str) -> s3fs.S3FileSystem:
        """The server as that user sees it; not cached, so users do not mix."""
        apart = {"skip_instance_cache": True, "use_listings_cache": False}
        return s3fs.S3FileSystem(key=user, secret=f"{user}-secret", endpoint_url=self.endpoint, **apart)


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """Run the server on data below ``folder`` until the block ends; nothing of it is left running."""
    ports = free_ports(2 * len(_PORTS))
    endpoint = f"http://127.0.0.1:{ports[_PORTS.index('s3')]}"
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            _command(folder, ports), stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
        )
        try:
            server = S3Server(endpoint)
            _wait(server, process, folder / "weed.log")
            yield server
        finally:
            _stop(process)


def _die_with_parent() -> None:
    """Also when the tests are killed: Linux's prctl(PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _command(folder: Path, ports: list[int]) -> list[str]:
    users = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": f"{name}-secret"}], "actions": _ACTIONS[name]}
        for name in USERS
    ]
    (folder / "users.json").write_text(json.dumps({"identities": users}))
    (folder / "data").mkdir()
    found = [str(Path(sys.executable).parent / "weed"), "server", f"-dir={folder / 'data'}", "-filer", "-s3"]
    found += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", f"-s3.config={folder / 'users.json'}"]
    # Many small volumes: each bucket takes several, and none is allocated in advance.
    found += ["-master.volumeSizeLimitMB=64", "-volume.max=40", "-volume.preStopSeconds=0"]
    found += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    found += [f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"]
    found += [f"-{name}.port={port}" for name, port in zip(_PORTS, ports, strict=False)]
    return found + [f"-{name}.port.grpc={port}" for name, port in zip(_PORTS, ports[len(_PORTS) :], strict=True)]


def _wait(server: S3Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until every bucket takes a file."""
    until = time.monotonic() + _READY_SECONDS
    fs = server.filesystem("admin")
    while True:
        try:
            for bucket in BUCKETS:
                if not fs.exists(bucket):
                    fs.mkdir(bucket)
                fs.pipe_file(f"{bucket}/.ready", b"ready")
                fs.rm_file(f"{bucket}/.ready")
            return
        except Exception as error:  # whatever a server that is starting answers
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the S3 server did not start ({error!r}):\n{log.read_text()[-2000:]}") from error
            time.sleep(0.3)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue
