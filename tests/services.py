"""Services started one by one, as on a cluster, on ports that the system gives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.processes.messages import Kind, unpack
from stagemesh.protos.v1.processes_pb2 import Listening

TIMEOUT_S = 90.0


def free_port() -> int:
    """One that the system has just given; for two services that are to have the same, one after the other."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(log: Path, text: str, timeout_s: float = 30) -> None:
    """Until the log of a process has the text."""
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in:\n{log.read_text()}"
        time.sleep(0.01)


def read_ports(fd: int) -> dict[str, int]:
    """What a service tells to its --ready-fd; nothing where it ended before."""
    with os.fdopen(fd, "rb") as pipe:
        said = pipe.read()
    if said.startswith(b"{"):
        return dict(json.loads(said))  # Releases before 0.4.
    return dict(unpack(Kind.LISTENING, Listening, said).ports) if said else {}


@dataclass
class Service:
    """A running `stagemesh` service and the ports that it got."""

    process: subprocess.Popen[bytes]
    ports: dict[str, int]


@contextlib.contextmanager
def service(folder: Path, *args: str, env: dict[str, str] | None = None) -> Iterator[Service]:
    """One service until the block ends; `env`: another environment than ours."""
    read_fd, write_fd = os.pipe()
    log = (folder / f"{args[0]}-{time.monotonic_ns()}.log").open("wb")
    command = [sys.executable, "-m", "stagemesh.cli.main", *args, "--ready-fd", str(write_fd)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[write_fd], env=env)
    os.close(write_fd)
    try:
        ports = read_ports(read_fd)
        assert ports, Path(log.name).read_text()
        yield Service(process, ports)
    except BaseException:
        print(Path(log.name).read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait(15)
        log.close()


def mesh_of(gateway: Service) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{gateway.ports['port']}/mesh", timeout=10) as response:
        return json.load(response)


def wait_ready(gateway: Service) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not mesh_of(gateway)["ready"]:
        assert time.monotonic() < deadline, mesh_of(gateway)["reason"]
        time.sleep(0.05)
