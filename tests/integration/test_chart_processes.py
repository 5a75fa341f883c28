"""The pods of the rendered chart, run as processes: their commands, files and environment make a mesh that answers.

Only what a machine must decide is changed, by variables, which beat the files: ports, and where the coordinator is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chart
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from services import read_ports

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
POD_IP = "127.0.0.1"
KEY = "demo-stagemesh-api-key/api-key"
QUESTION = {"messages": [{"role": "user", "content": "What is seven plus five?"}], "max_tokens": 32, "temperature": 0}


class Running:
    """One pod's command as a process; its config file where the pod has it is a file in `folder` here."""

    def __init__(self, pod: chart.Pod, folder: Path, **env: str) -> None:
        self.pod = pod
        self.name = pod.owner["metadata"]["name"]
        args = pod.args
        at = args.index("--config") + 1
        file = folder / f"{self.name}.yaml"
        file.write_text(pod.file(args[at]))
        args[at] = str(file)
        self.log = folder / f"{self.name}.log"
        outside = {key: value for key, value in os.environ.items() if not key.startswith("STAGEMESH_")}
        read_fd, write_fd = os.pipe()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stagemesh.cli.main", *args, "--ready-fd", str(write_fd)],
                pass_fds=[write_fd],
                env={**outside, "OMP_NUM_THREADS": "1", **pod.env(POD_IP), **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(write_fd)
        self.ports = read_ports(read_fd)
        assert self.ports, f"{self.name} did not listen:\n{self.log.read_text()}"

    def probe(self) -> int:
        """What the kubelet's gRPC probe would hear."""
        with grpc.insecure_channel(f"{POD_IP}:{self.ports['port']}") as channel:
            return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status)

    def stop(self) -> int:
        """SIGTERM, as Kubernetes ends a pod; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


def fetch(url: str, body: Any = None, key: str = "") -> tuple[int, Any]:
    """Status and JSON of an HTTP request."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[list[Running]]:
    # UCX in these processes would meet on the test machine's shared memory, which pods do not have in common.
    objects = chart.render(sets=('coordinator.settings={"transport": "tcp"}',))
    pods = {pod.owner["metadata"]["name"].removeprefix("demo-stagemesh-"): pod for pod in chart.services(objects)}
    assert sorted(pods) == ["coordinator", "gateway", "stage-0", "stage-1"]
    running: list[Running] = []
    with contextlib.ExitStack() as stack:
        state = {"STAGEMESH_STATE_DIR": str(tmp_path / "state")}
        for name, env in (("coordinator", state), ("stage-0", {}), ("stage-1", {}), ("gateway", {})):
            if running:
                env = {"STAGEMESH_COORDINATOR": f"{POD_IP}:{running[0].ports['port']}"}
            env |= {"STAGEMESH_PORT": "0"} | ({"STAGEMESH_GRPC_PORT": "0"} if name == "gateway" else {})
            running.append(Running(pods[name], tmp_path, **env))
            stack.callback(end, running[-1].process)
        yield running


def end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_pods_make_a_mesh_that_answers(mesh: list[Running]) -> None:
    coordinator, *stages, gateway = mesh
    url = f"http://{POD_IP}:{gateway.ports['port']}"
    ready, live = (gateway.pod.container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness"))
    assert fetch(url + live)[0] == 200
    deadline = time.monotonic() + START_TIMEOUT_S
    while fetch(url + ready)[0] != 200:
        logs = "\n".join(one.log.read_text() for one in mesh)
        assert time.monotonic() < deadline, f"{fetch(url + ready)}\n{logs}"
        assert all(one.process.poll() is None for one in mesh), logs
        time.sleep(0.1)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert [one.probe() for one in (coordinator, *stages)] == [serving] * 3
    assert fetch(f"{url}/v1/chat/completions", QUESTION)[0] == 401
    status, answer = fetch(f"{url}/v1/chat/completions", QUESTION, KEY)
    assert status == 200, answer
    assert "twelve" in answer["choices"][0]["message"]["content"].lower()
    workers = fetch(f"{url}/mesh")[1]["workers"]
    assert sorted(worker["worker_id"] for worker in workers) == ["demo-stagemesh-stage-0-0", "demo-stagemesh-stage-1-0"]
    assert all(worker["address"].startswith(f"{POD_IP}:") for worker in workers)
    assert [one.stop() for one in (gateway, *stages, coordinator)] == [0, 0, 0, 0]
