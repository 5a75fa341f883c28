"""Hosts for chaos tests: network namespaces on one bridge, whose ways to each other can be cut, one way or both, or
made slow.

A cut is silent, as a pulled cable is: packets are dropped, no connection is reset.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

NET = "10.78.0"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


def _ip(*args: str) -> None:
    _run("ip", *args)


@dataclass
class Host:
    """One namespace with one address."""

    name: str
    address: str

    def command(self, *args: str) -> list[str]:
        """A command line that runs there."""
        return ["ip", "netns", "exec", self.name, *args]


class Hosts:
    """`count` hosts that reach each other; also from this process, by the bridge's own address."""

    def __init__(self, count: int) -> None:
        self._bridge = f"smbr{os.getpid() % 10**8}"
        self.here = f"{NET}.254"
        self.hosts = [Host(f"sm{os.getpid()}-{i}", f"{NET}.{i + 1}") for i in range(count)]

    def __enter__(self) -> Hosts:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.here}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for i, host in enumerate(self.hosts):
            _ip("netns", "add", host.name)
            outer = f"smv{os.getpid() % 10**6}-{i}"
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", outer, "master", self._bridge, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", host.name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True, timeout=20)
        subprocess.run(["ip", "link", "delete", self._bridge], check=False, capture_output=True, timeout=20)

    @contextlib.contextmanager
    def cut(self, *ways: tuple[int, int]) -> Iterator[None]:
        """Nothing that host `a` sends reaches host `b`, for each (a, b), until the block ends."""
        rules = [(self.hosts[a].name, f"{self.hosts[b].address}/32") for a, b in ways]
        try:
            for name, address in rules:
                _ip("-n", name, "route", "add", "blackhole", address)
            yield
        finally:
            for name, address in rules:
                subprocess.run(["ip", "-n", name, "route", "del", "blackhole", address], check=False, timeout=20)

    @contextlib.contextmanager
    def slow(self, rate: str, *hosts: int) -> Iterator[None]:
        """What these hosts send goes at most so fast ("1mbit"), until the block ends; the rest waits in line."""
        names = [self.hosts[number].name for number in hosts]
        try:
            for name in names:
                limit = ("rate", rate, "burst", "16kb", "latency", "2s")
                _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
            yield
        finally:
            for name in names:
                subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", "eth0", "root"], check=False, timeout=20)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Hosts until the block ends; skips where they cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2 (`apt-get install iproute2`)")
    with Hosts(count) as made:
        yield made


@contextlib.contextmanager
def services(folder: Path, commands: list[tuple[Host, list[str]]]) -> Iterator[list[Path]]:
    """`stagemesh` services until the block ends; the logs of all, told when it fails."""
    running: list[subprocess.Popen[bytes]] = []
    logs: list[Path] = []
    try:
        for i, (host, args) in enumerate(commands):
            logs.append(folder / f"{i}-{args[0]}.log")
            with logs[-1].open("wb") as out:
                command = host.command(sys.executable, "-m", "stagemesh.cli.main", *args)
                running.append(subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
        yield logs
    except BaseException:
        for log in logs:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}", file=sys.stderr)
        raise
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
