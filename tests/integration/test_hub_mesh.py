"""Meshes whose model is on a hub: who fetches what, from which commit, and what is said when that fails."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from hub_server import Hub, hash_of, running_hub
from mesh import serve
from services import Service, mesh_of, service, wait_ready
from tiny_models import by_layer, make_checkpoint, reference_greedy, split_weights

from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc

REPO = "org/tiny"
TOKEN = "hf_aTokenThatNobodyShouldSee"
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a file for each layer. First and last stage both need that of the embedding."""
    folder = tmp_path_factory.mktemp("hub")
    whole = make_checkpoint("llama_tied", folder / "whole")
    return split_weights(Path(shutil.copytree(whole, folder / "split")), by_layer)


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add(REPO, model)
        yield hub


def move_branch(hub: Hub, model: Path, folder: Path) -> None:
    """Lets main name other weights."""
    later = make_checkpoint("llama_tied", folder, seed=9)
    hub.add(REPO, split_weights(later, by_layer))


def weights_in(home: Path) -> set[str]:
    return {path.stem for path in home.glob("hub/models--org--tiny/snapshots/*/*.safetensors")}


def layers(*numbers: int) -> set[str]:
    return {f"layer-{number}" for number in numbers}


def wait_for(what: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


class Cluster:
    """Services started one by one. Each has a cache of its own, as on a node of its own."""

    def __init__(self, hub: Hub, folder: Path, stack: contextlib.ExitStack) -> None:
        self.hub, self.folder, self.stack = hub, folder, stack
        self.coordinator: Service
        self.port = 0

    def home(self, name: str) -> Path:
        return self.folder / name

    def start(self, name: str, *args: str, **env: str) -> Service:
        """Starts a service. It is ended with the test, or before by `stop`."""
        (self.folder / f"log-{name}").mkdir(exist_ok=True)
        whole = {**os.environ, **self.hub.env(self.home(name)), **env}
        return self.stack.enter_context(service(self.folder / f"log-{name}", *args, env=whole))

    def start_coordinator(self, *args: str, **env: str) -> Service:
        told = ("--model", REPO, "-pp", "2", "--layer-partition", "3,3", *args)
        self.coordinator = self.start("coordinator", "coordinator", *told, "--port", str(self.port), **env)
        self.port = self.coordinator.ports["port"]
        return self.coordinator

    def join(self, name: str, *args: str, **env: str) -> Service:
        return self.start(name, *args, "--coordinator", f"127.0.0.1:{self.port}", "--port", "0", **env)

    def start_gateway(self, **env: str) -> Service:
        return self.join("gateway", "gateway", "--grpc-port", "0", **env)

    def start_stage(self, stage: int, *args: str, **env: str) -> Service:
        return self.join(f"stage-{stage}", "stage", "--stage", str(stage), "--worker-id", f"w{stage}", *args, **env)

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / f"log-{name}").iterdir()))

    def model(self) -> Any:
        """What the coordinator tells of the model."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub = coordinator_pb2_grpc.CoordinatorStub(channel)

            def described() -> Any:
                with contextlib.suppress(grpc.RpcError):  # It waits for workers that come back.
                    return stub.DescribeMesh(coordinator_pb2.DescribeMeshRequest(), timeout=10)

            return wait_for(described).mesh.pipelines[0].model


@pytest.fixture
def cluster(hub: Hub, tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(hub, tmp_path, stack)


def complete(gateway: Service) -> list[int]:
    from stagemesh import Client

    async def run() -> list[int]:
        async with Client(f"127.0.0.1:{gateway.ports['grpc_port']}") as client:
            done = await client.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
            return list(done.token_ids)

    import asyncio

    return asyncio.run(run())


def test_each_service_fetches_what_it_needs_and_all_from_one_commit(
    cluster: Cluster, hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.secret[REPO] = TOKEN
    commit = hub.refs[REPO, "main"]
    told = {"HF_TOKEN": TOKEN}
    cluster.start_coordinator("--state-dir", str(tmp_path / "state"), **told)
    move_branch(hub, model, tmp_path / "later")
    gateway = cluster.start_gateway(**told)
    hub.held["layer-1.safetensors"] = threading.Event()
    cluster.start_stage(0, **told)
    cluster.start_stage(1, **told)

    def fetching() -> Any:
        workers = {worker["worker_id"]: worker for worker in mesh_of(gateway).get("workers", [])}
        first = workers.get("w0", {})
        return first.get("state") == "fetching" and 0 < int(first["loaded_bytes"]) < int(first["total_bytes"]) and first

    worker = wait_for(fetching)
    wanted = ("embedding", "layer-0", "layer-1", "layer-2")
    assert int(worker["total_bytes"]) == sum((model / f"{name}.safetensors").stat().st_size for name in wanted)
    hub.held["layer-1.safetensors"].set()
    wait_ready(gateway)
    assert "is lost" not in cluster.log("coordinator"), "a download does not delay the lease"
    assert complete(gateway) == reference_greedy(model.parent / "whole", PROMPT, 8)
    assert weights_in(cluster.home("coordinator")) == weights_in(cluster.home("gateway")) == set()
    assert weights_in(cluster.home("stage-0")) == {"embedding"} | layers(0, 1, 2)
    assert weights_in(cluster.home("stage-1")) == {"embedding", "head"} | layers(3, 4, 5)
    assert {folder.name for folder in tmp_path.glob("*/hub/models--org--tiny/snapshots/*")} == {commit}
    assert mesh_of(gateway)["pipelines"][0]["model"]["name"] == REPO

    # Other layers: what is new is fetched, of the same commit.
    hub.requests.clear()
    address = f"127.0.0.1:{cluster.port}"
    command = [sys.executable, "-m", "stagemesh.cli.main", "repartition", "2,4", "--coordinator", address]
    subprocess.run(command, check=True, timeout=90, capture_output=True)
    assert weights_in(cluster.home("stage-1")) == {"embedding", "head"} | layers(2, 3, 4, 5)
    assert {request.path.split("/")[-1] for request in hub.requests if "/resolve/" in request.path} == {
        "layer-2.safetensors"
    }
    assert complete(gateway) == reference_greedy(model.parent / "whole", PROMPT, 8)

    # A coordinator that is started again goes on with the commit, and does not even ask the hub.
    hub.requests.clear()
    epoch = mesh_of(gateway)["pipelines"][0]["epoch"]
    cluster.coordinator.process.kill()
    cluster.coordinator.process.wait(10)
    cluster.start_coordinator("--state-dir", str(tmp_path / "state"), **told)
    assert cluster.model().commit == commit
    assert not hub.requests
    wait_ready(gateway)
    assert mesh_of(gateway)["pipelines"][0]["epoch"] == epoch
    for name in ("coordinator", "gateway", "stage-0", "stage-1"):
        assert TOKEN not in cluster.log(name)
    assert {request.token for request in hub.requests if request.path.startswith("/cdn/")} <= {""}


def test_a_mesh_on_one_machine_fetches_each_file_once_and_starts_again_without_a_hub(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    expected = reference_greedy(model.parent / "whole", PROMPT, 8)
    with serve(f"{REPO}@main", "-pp", "2", env=hub.env(tmp_path)) as mesh:
        assert mesh.model == REPO
        assert mesh.greedy(PROMPT, 8) == expected
    whole = [request for request in hub.requests if request.is_file and not request.range]
    for path in model.glob("*.safetensors"):
        taken = sum(request.sent for request in whole if request.path.endswith(hash_of(path.name, path.read_bytes())))
        assert taken == path.stat().st_size, path.name
    hub.requests.clear()
    with serve(REPO, "-pp", "3", env=hub.env(tmp_path, HF_HUB_OFFLINE="1")) as mesh:
        assert mesh.greedy(PROMPT, 8) == expected
    assert not hub.requests


def test_a_draft_model_may_be_on_a_hub(hub: Hub, model: Path, tmp_path: Path) -> None:
    config = json.dumps({"method": "draft_model", "model": f"{REPO}@main", "num_speculative_tokens": 2})
    whole = model.parent / "whole"
    with serve(str(whole), "-pp", "2", "--speculative-config", config, env=hub.env(tmp_path)) as mesh:
        assert mesh.greedy(PROMPT, 8) == reference_greedy(whole, PROMPT, 8)
    assert weights_in(tmp_path) == {"embedding", "head"} | layers(0, 1, 2, 3, 4, 5)


def test_random_weights_need_only_what_describes_a_model(hub: Hub, tmp_path: Path) -> None:
    with serve(REPO, "-pp", "2", "--load-format", "dummy", env=hub.env(tmp_path)) as mesh:
        assert len(mesh.greedy(PROMPT, 4)) == 4
    assert weights_in(tmp_path) == set()
    assert not any(request.path.startswith("/cdn/") for request in hub.requests)


def test_a_download_ends_with_its_assignment(cluster: Cluster, hub: Hub) -> None:
    hub.held["layer-4.safetensors"] = threading.Event()
    cluster.start_coordinator()
    stage = cluster.start_stage(1)
    cluster.start_stage(0)
    agent = psutil.Process(stage.process.pid)

    def fetchers() -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child for child in agent.children() if "stagemesh fetch" in " ".join(child.cmdline())]
        return []

    (fetcher,) = wait_for(fetchers)
    wait_for(lambda: "layer-4" in {Path(name).stem for name in weights_asked(hub)})
    cluster.coordinator.process.kill()
    wait_for(lambda: not fetcher.is_running())
    assert stage.process.poll() is None
    # The first part stays. The next assignment goes on with it.
    del hub.held["layer-4.safetensors"]
    cluster.start_coordinator()
    gateway = cluster.start_gateway()
    wait_ready(gateway)
    half = len(hub.content("layer-4.safetensors")) // 2
    assert any(request.range == f"bytes={half}-" for request in hub.requests)


def weights_asked(hub: Hub) -> list[str]:
    return [
        request.path for request in list(hub.requests) if request.path.endswith(".safetensors") and not request.range
    ]


def test_a_stage_that_may_not_fetch_says_why_and_one_that_cannot_tries_again(cluster: Cluster, hub: Hub) -> None:
    hub.gated[REPO] = TOKEN
    cluster.start_coordinator(HF_TOKEN=TOKEN)
    gateway = cluster.start_gateway(HF_TOKEN=TOKEN)
    cluster.start_stage(0, HF_TOKEN=TOKEN)
    second = cluster.start_stage(1, HF_TOKEN="")
    pipeline = wait_for(lambda: "gated" in (found := mesh_of(gateway)["pipelines"][0])["reason"] and found)
    assert "stage 1: worker w1 cannot assign: org/tiny is gated: accept its conditions at " in pipeline["reason"]
    assert "no token is set (HF_TOKEN)" in pipeline["reason"]
    assert pipeline["final"], "another try would be refused, too"
    second.process.terminate()
    second.process.wait(15)

    hub.status["/cdn/"] = 503
    cluster.start_stage(1, HF_TOKEN=TOKEN)
    pipeline = wait_for(lambda: "503" in (found := mesh_of(gateway)["pipelines"][0])["reason"] and found, 90)
    assert "the hub has a problem" in pipeline["reason"]
    assert not pipeline["final"]
    hub.status.clear()
    wait_ready(gateway)


def test_workers_with_another_model_are_told_so(cluster: Cluster, hub: Hub, model: Path) -> None:
    cluster.start_coordinator()
    gateway = cluster.start_gateway()
    cluster.start_stage(0)
    cluster.start_stage(1, "--model", str(model))
    reason = wait_for(lambda: (found := mesh_of(gateway)["pipelines"][0]["reason"]) and "--model" in found and found)
    assert f"--model {model} of this worker is not the coordinator's org/tiny@{hub.refs[REPO, 'main']}" in reason


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (lambda data: b"<!DOCTYPE html><html>Sorry</html>" + b" " * 100, "is a web page"),
        (lambda data: data[: len(data) // 2], "is cut short"),
    ],
    ids=["pointer", "page", "cut"],
)
def test_serve_refuses_weights_that_are_no_weights(
    model: Path, tmp_path: Path, damage: Callable[[bytes], bytes], says: str
) -> None:
    """In a hub's repository, and in a folder."""
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    file = broken / "layer-1.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with running_hub() as hub:
        commit = hub.add(REPO, broken)
        for told, where in ((REPO, f"{REPO}@{commit}/{file.name}"), (str(broken), str(file))):
            done = subprocess.run(
                [sys.executable, "-m", "stagemesh.cli.main", "serve", told, "--port", "0"],
                env={**os.environ, **hub.env(tmp_path / "home")},
                capture_output=True,
                text=True,
                timeout=90,
                check=False,
            )
            assert done.returncode == 2
            assert f"stagemesh coordinator: {where} {says}" in done.stderr
            assert "Traceback" not in done.stderr
