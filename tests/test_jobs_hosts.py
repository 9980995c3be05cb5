"""A job on several hosts, one of which vanishes: each is a network namespace with an address and a Ray session of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from whole_jobs import ROOT, check, start, write_shard

from benchmarks.soak_job import actors

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PORT = 6379
SOON = {
    # The head calls a host dead that has not answered for 3 to 6 seconds; as Ray has it, that takes about a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # The driver gives up a connection that has been silent for 10 seconds; pipeline.cluster makes it 95. Servers are told too:
    # they refuse pings that come more often than they expect them.
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
# For every Python process: a disk that takes its time, so that something is being written whenever the host vanishes.
SLOW_DISK = """
import os, time

sync = os.fsync

def slowly(file):
    time.sleep(1)
    sync(file)

os.fsync = slowly
"""
# A host has a name, knows the others' without asking a server for them, and keeps Ray's session to itself.
SETTLE = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
mount --bind "$2/$1" /tmp/ray
shift 2
exec "$@"
"""


class Network:
    """Hosts on one switch, each a namespace: what runs on one shares files with the others, and nothing else but the switch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefix = folder, f"mllama-{os.getpid()}-"
        self.hosts: list[str] = []
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.switch = f"{self.prefix}switch"

    def open(self) -> None:
        """Makes the switch."""
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "address", "add", "10.99.0.254/24", "dev", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n")
        Path("/tmp/ray").mkdir(exist_ok=True)

    def add(self, name: str) -> str:
        """The address of a new host."""
        space = self.prefix + name
        ip("netns", "add", space)
        self.hosts.append(name)
        address = f"10.99.0.{len(self.hosts)}"
        ip("-n", self.switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", self.switch, "link", "set", name, "master", "bridge", "up")
        ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", space, "link", "set", "eth0", "up")
        # Nothing lies behind it: Ray asks the routes for its own address.
        ip("-n", space, "route", "add", "default", "via", "10.99.0.254")
        (self.folder / name).mkdir()
        with (self.folder / "hosts").open("a") as names:
            print(address, name, file=names)
        return address

    def on(self, name: str) -> tuple[str, ...]:
        """What goes before a command for it to run on that host, in the process that is started."""
        enter = ("ip", "netns", "exec", self.prefix + name, "unshare", "--uts")
        return (*enter, "sh", "-ec", SETTLE, "sh", name, str(self.folder))

    def ray(self, name: str, *options: str, **environment: str) -> None:
        """Starts a node of Ray on that host."""
        address = self.add(name)
        with (self.folder / f"{name}.log").open("w") as log:
            node = subprocess.Popen(
                [
                    *self.on(name),
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", address),
                    *("--disable-usage-stats", *options),
                ],
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(node)

    def cut(self, name: str) -> None:
        """Takes the host's cable out: it runs on, and neither hears nor is heard."""
        ip("-n", self.switch, "link", "set", name, "down")

    def pids(self, name: str) -> set[int]:
        """Processes on that host."""
        return {int(pid) for pid in ip("netns", "pids", self.prefix + name).split()}

    def close(self) -> None:
        """Ends every process on every host, and removes the hosts."""
        for _ in range(50):
            # Again, for what was being started meanwhile.
            if not (left := {pid for name in self.hosts for pid in self.pids(name)}):
                break
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for node in self.nodes:
            node.wait()
        for space in (*(self.prefix + name for name in self.hosts), self.switch):
            ip("netns", "delete", space)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip, of iproute2")
    probe = f"mllama-{os.getpid()}-probe"
    permitted = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if permitted.returncode:
        pytest.skip(f"may not make network namespaces: {permitted.stderr.strip()}")
    ip("netns", "delete", probe)
    made = Network(tmp_path)
    try:
        made.open()
        yield made
    finally:
        made.close()


def test_a_host_that_vanishes_is_replaced(
    network: Network, tmp_path: Path, checkpoint_folder: str, picture: Callable[..., bytes]
) -> None:
    """It had the actor, blocks that were read and not yet answered, and files that were being written."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW_DISK)
    head = f"10.99.0.1:{PORT}"
    network.ray("head", "--head", "--port", str(PORT), "--num-cpus", "0", "--include-dashboard", "false", **SOON)
    network.ray("second", "--address", head, "--num-cpus", "3", **SOON, PYTHONPATH=f"{tmp_path / 'slow'}{os.pathsep}{ROOT}")
    given = ["--ray-address", head, "--wait-minutes", "2", "--gpus-per-actor", "0"]
    job = start(write_shard(tmp_path, picture), checkpoint_folder, *given, before=network.on("head"), **SOON)
    try:
        job.wait_for_files(2)
        assert len(set(actors()) & network.pids("second")) == 1
        assert not set(actors()) & network.pids("head")

        network.cut("second")
        network.ray("third", "--address", head, "--num-cpus", "3", **SOON)
        assert job.wait(120) == 0, job.said
    finally:
        job.end()
    check(job.output)
