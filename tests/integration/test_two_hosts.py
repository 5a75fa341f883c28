"""docs/two-hosts.md, walked through: two network namespaces joined by veth, a stage in each, UCX over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ALPHA, BETA = "10.77.0.1", "10.77.0.2"
NAMES = (f"sm-alpha-{os.getpid()}", f"sm-beta-{os.getpid()}")
READY_TIMEOUT_S = 90.0


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with an address each on a veth pair."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts need root and iproute2 (`apt-get install iproute2`)")
    alpha, beta = NAMES
    try:
        ip("netns", "add", alpha)
        ip("netns", "add", beta)
        ip("link", "add", "eth-alpha", "netns", alpha, "type", "veth", "peer", "name", "eth-beta", "netns", beta)
        for name, device, address in ((alpha, "eth-alpha", ALPHA), (beta, "eth-beta", BETA)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield alpha, beta
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)


@contextlib.contextmanager
def service(host: str, folder: Path, *args: str) -> Iterator[None]:
    """One `stagemesh` service on a host until the block ends."""
    log = folder / f"{args[0]}-{host}.log"
    with log.open("wb") as out:
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "stagemesh.cli.main", *args]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        yield
    except BaseException:
        print(f"--- {log.name}\n{log.read_text()[-4000:]}", file=sys.stderr)
        raise
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def curl(host: str, url: str, body: dict[str, Any] | None = None) -> Any:
    """A request from a host; None while nobody answers with 200."""
    code = (
        "import json, sys, urllib.request as u\n"
        "url, body = sys.argv[1:]\n"
        "data = body.encode() if body else None\n"
        "print(u.urlopen(u.Request(url, data, {'Content-Type': 'application/json'}), timeout=20).read().decode())"
    )
    command = ["ip", "netns", "exec", host, sys.executable, "-c", code, url, json.dumps(body) if body else ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return json.loads(done.stdout) if done.returncode == 0 and done.stdout.strip() else None


def test_two_hosts_serve_one_model(hosts: tuple[str, str], tmp_path: Path) -> None:
    alpha, beta = hosts
    coordinator = f"{ALPHA}:50050"
    stage = ["stage", "--insecure", "--coordinator", coordinator, "--ucx-tls", "tcp", "--threads", "1"]
    state = ["--state-dir", str(tmp_path)]
    front = ["--port", "8000", "--grpc-port", "50051"]
    with contextlib.ExitStack() as stack:

        def start(host: str, *args: str) -> None:
            stack.enter_context(service(host, tmp_path, *args))

        start(
            alpha,
            "coordinator",
            "--host",
            ALPHA,
            "--insecure",
            "--port",
            "50050",
            "-pp",
            "2",
            "--transport",
            "ucx",
            *state,
        )
        start(alpha, *stage, "--host", ALPHA, "--stage", "0", "--worker-id", "alpha", "--net-device", "eth-alpha")
        start(beta, *stage, "--host", BETA, "--stage", "1", "--worker-id", "beta", "--net-device", "eth-beta")
        start(alpha, "gateway", "--host", ALPHA, "--insecure", "--coordinator", coordinator, *front)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while curl(beta, f"http://{ALPHA}:8000/readyz") is None:
            assert time.monotonic() < deadline, "the mesh did not get ready"
            time.sleep(0.2)
        question = [{"role": "user", "content": "What is seven plus five?"}]
        body = {"model": "stagemesh-demo", "messages": question, "temperature": 0}
        answer = curl(beta, f"http://{ALPHA}:8000/v1/chat/completions", body)
        assert "twelve" in answer["choices"][0]["message"]["content"].lower()
        mesh = curl(alpha, f"http://{ALPHA}:8000/mesh")
        stages = mesh["pipelines"][0]["stages"]
        assert [s["worker_id"] for s in stages] == ["alpha", "beta"]
        assert stages[0]["route"] == "tcp"
        assert stages[1]["address"].startswith(BETA)
