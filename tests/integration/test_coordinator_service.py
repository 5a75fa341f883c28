"""The coordinator as a process of its own, spoken to over gRPC: by plain clients first, then by real stage workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from services import read_ports

from stagemesh import rpc
from stagemesh.errors import ConfigError, InvalidRequest, NotFound, StagemeshError, Unavailable
from stagemesh.protocol import PROTOCOL
from stagemesh.protos.v1 import coordinator_pb2 as pb
from stagemesh.protos.v1 import coordinator_pb2_grpc, types_pb2

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
DOWN, FORMING, SERVING, DRAINING = (
    types_pb2.PIPELINE_STATE_DOWN,
    types_pb2.PIPELINE_STATE_FORMING,
    types_pb2.PIPELINE_STATE_SERVING,
    types_pb2.PIPELINE_STATE_DRAINING,
)
NOBODY = "127.0.0.1:1"  # nothing listens there


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


class Process:
    """A service of the `stagemesh` command; ends with the test."""

    def __init__(self, *arguments: str, ready: bool = True, log: Path | None = None) -> None:
        reader, writer = os.pipe()
        self.log = log
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(log.open("ab")) if log else subprocess.DEVNULL
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "stagemesh.cli.main", *arguments, "--ready-fd", str(writer)],
                pass_fds=[writer],
                stdout=out,
                stderr=out,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        os.close(writer)
        if not ready:
            os.close(reader)
        elif not (ports := read_ports(reader)):
            self.stop()
            raise AssertionError(f"{arguments[0]} did not start: {log.read_text() if log else ''}")
        self.port = ports["port"] if ready else 0

    def stop(self, number: int = signal.SIGKILL) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(20)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts services and ends them."""
    started: list[Process] = []

    def one(*arguments: str, ready: bool = True) -> Process:
        process = Process(*arguments, ready=ready, log=tmp_path / f"{len(started)}-{arguments[0]}.log")
        started.append(process)
        return process

    yield one
    for process in started:
        process.stop()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def coordinator(start: Callable[..., Process], model: Path) -> Process:
    return start("coordinator", "--model", str(model), "--load-format", "dummy", "-pp", "2", "--port", "0")


def talk(port: int, story: Callable[[Any], Coroutine[Any, Any, None]], limit_s: float = 30.0) -> None:
    """Runs `story(stub)` against the coordinator at `port`."""

    async def told() -> None:
        async with rpc.channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(limit_s):
            await story(coordinator_pb2_grpc.CoordinatorStub(channel))

    asyncio.run(told())


def introduction(name: str, incarnation: int = 1, pool: int = -1, **changes: Any) -> pb.RegisterRequest:
    fields = {
        "worker_id": name,
        "incarnation": incarnation,
        "address": NOBODY,
        "pool": pool,
        "tp_size": 1,
        "protocol": PROTOCOL,
        "transports": [types_pb2.TransportEndpoints(name="tcp", rank_addresses=[b"a"])],
    }
    return pb.RegisterRequest(**{**fields, **changes})


class Renewing:
    """A worker's keep-alive stream, renewed until told to be silent; remembers whether it is known."""

    def __init__(self, stub: Any, name: str, incarnation: int = 1) -> None:
        self.silent = asyncio.Event()
        self.answered = asyncio.Event()
        self.known: bool | None = None
        self._request = pb.KeepAliveRequest(worker_id=name, incarnation=incarnation)
        self._queue: asyncio.Queue[pb.KeepAliveRequest] = asyncio.Queue(4)
        self._call = stub.KeepAlive(self._requests())
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._hear())]

    async def _requests(self) -> AsyncIterator[pb.KeepAliveRequest]:
        while True:
            yield await self._queue.get()

    async def _renew(self) -> None:
        while not self.silent.is_set():
            await self._queue.put(self._request)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.silent.wait(), 0.15)

    async def _hear(self) -> None:
        with contextlib.suppress(grpc.RpcError):
            async for response in self._call:
                self.known = response.known
                self.answered.set()

    def once(self) -> None:
        """One more renewal after the silence."""
        self.answered.clear()
        self._queue.put_nowait(self._request)

    async def end(self) -> None:
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def until(watch: Any, wanted: Callable[[pb.WatchPipelinesResponse], bool]) -> pb.WatchPipelinesResponse:
    """Reads a watch until a message is as wanted (the caller's deadline bounds it)."""
    async for message in watch:
        if wanted(message):
            return message
    raise AssertionError("the watch ended")


def watch_request(gateway: str = "g", instance: int = 1, life: int = 0) -> pb.WatchPipelinesRequest:
    return pb.WatchPipelinesRequest(gateway_id=gateway, instance=instance, life=life)


def workers(message: Any) -> dict[str, str]:
    return {w.worker_id: w.state for w in message.mesh.workers}


def test_a_watch_tells_the_mesh_at_once_and_every_change(coordinator: Process, model: Path) -> None:
    async def story(stub: Any) -> None:
        watch = stub.WatchPipelines(watch_request())
        first = await until(watch, lambda _: True)
        assert 1 <= first.slot <= 250
        (pipeline,) = first.pipelines
        assert (pipeline.state, pipeline.final) == (DOWN, False)
        assert "stages 0, 1 have no worker" in pipeline.reason
        assert (pipeline.model.num_layers, pipeline.model.path) == (4, str(model))
        assert (pipeline.limits.max_model_len, pipeline.limits.steps_in_flight) == (512, 2)
        lease = await stub.Register(introduction("w0"))
        assert (lease.lease_ms, lease.renew_ms) == (600, 150)
        seen = await until(watch, lambda m: "w0" in workers(m))
        assert workers(seen) == {"w0": "standby"}
        assert "stage 1 has no worker" in seen.pipelines[0].reason
        told = await stub.DescribeMesh(pb.DescribeMeshRequest())
        assert [w.worker_id for w in told.mesh.workers] == ["w0"]

    talk(coordinator.port, story)


def test_workers_that_cannot_be_reached_are_tried_again_at_higher_epochs_with_the_reason(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        renewing = []
        for name in ("w0", "w1"):
            await stub.Register(introduction(name))
            renewing.append(Renewing(stub, name))
        watch = stub.WatchPipelines(watch_request())
        first = await until(watch, lambda m: m.pipelines[0].state == FORMING and "stage" in m.pipelines[0].reason)
        assert "connect" in first.pipelines[0].reason.lower(), first.pipelines[0].reason
        assert [(s.worker_id, s.layers.first, s.layers.last) for s in first.pipelines[0].stages] == [
            ("w0", 0, 2),
            ("w1", 2, 4),
        ]
        epoch = first.pipelines[0].epoch
        await until(watch, lambda m: m.pipelines[0].epoch >= epoch + 2)
        for one in renewing:
            await one.end()

    talk(coordinator.port, story)


def test_a_worker_that_falls_silent_is_lost_when_its_lease_ends(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        await stub.Register(introduction("w0"))
        renewing = Renewing(stub, "w0")
        watch = stub.WatchPipelines(watch_request())
        await until(watch, lambda m: workers(m).get("w0") == "standby")
        await asyncio.wait_for(renewing.answered.wait(), 5)
        assert renewing.known
        renewing.silent.set()
        fell_silent = time.monotonic()
        await until(watch, lambda m: workers(m).get("w0") == "lost")
        assert 0.3 < time.monotonic() - fell_silent < 1.5
        renewing.once()  # the stream still stands: it is told to register again
        await asyncio.wait_for(renewing.answered.wait(), 5)
        assert renewing.known is False
        await renewing.end()

    talk(coordinator.port, story)


def test_a_stream_that_breaks_is_a_worker_lost_at_once(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        await stub.Register(introduction("w0"))
        renewing = Renewing(stub, "w0")
        await asyncio.wait_for(renewing.answered.wait(), 5)
        watch = stub.WatchPipelines(watch_request())
        await until(watch, lambda m: workers(m).get("w0") == "standby")
        broke = time.monotonic()
        await renewing.end()
        await until(watch, lambda m: workers(m).get("w0") == "lost")
        assert time.monotonic() - broke < 0.4  # before the lease's 600 ms

    talk(coordinator.port, story)


def test_an_old_stream_that_breaks_late_does_not_take_the_worker_down(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        await stub.Register(introduction("w0"))
        old = Renewing(stub, "w0")
        await asyncio.wait_for(old.answered.wait(), 5)
        await stub.Register(introduction("w0"))
        new = Renewing(stub, "w0")
        await asyncio.wait_for(new.answered.wait(), 5)
        await old.end()
        new.answered.clear()
        await asyncio.wait_for(new.answered.wait(), 5)
        assert new.known
        told = await stub.DescribeMesh(pb.DescribeMeshRequest())
        assert workers(told) == {"w0": "standby"}
        await new.end()

    talk(coordinator.port, story)


def test_an_unknown_life_of_a_worker_is_told_to_register(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        await stub.Register(introduction("w0", incarnation=2))
        renewing = Renewing(stub, "w0", incarnation=1)
        await asyncio.wait_for(renewing.answered.wait(), 5)
        assert renewing.known is False
        await renewing.end()

    talk(coordinator.port, story)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"protocol": 99}, ConfigError, "protocol 99"),
        ({"worker_id": ""}, InvalidRequest, "worker_id"),
        ({"incarnation": 0}, InvalidRequest, "incarnation"),
        ({"tp_size": 0}, InvalidRequest, "tp_size"),
        ({"pool": 2}, ConfigError, "stages 0 to 1"),
        ({"tp_size": 2}, InvalidRequest, "1 rank addresses for 2 ranks"),
    ],
)
def test_an_introduction_that_cannot_be(
    coordinator: Process, changes: dict[str, Any], error: type[StagemeshError], words: str
) -> None:
    async def story(stub: Any) -> None:
        with pytest.raises(error, match=words), rpc.mapped():
            await stub.Register(introduction("w0", **changes))
        told = await stub.DescribeMesh(pb.DescribeMeshRequest())
        assert workers(told) == {}

    talk(coordinator.port, story)


def test_draining_an_unknown_worker(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        await stub.Register(introduction("w0"))
        # It may be a worker of before that has not come back yet.
        with pytest.raises(Unavailable, match="has just started"), rpc.mapped():
            await stub.Drain(pb.DrainRequest(worker_id="w9"))

        async def drain_when_all_are_back() -> None:
            async with asyncio.timeout(10):
                while True:
                    with contextlib.suppress(Unavailable), rpc.mapped():
                        await stub.Drain(pb.DrainRequest(worker_id="w9"))
                    await asyncio.sleep(0.05)

        with pytest.raises(NotFound, match="no worker 'w9' is registered; registered: none"):
            await drain_when_all_are_back()

    talk(coordinator.port, story)


def test_a_gateway_keeps_its_slot_over_streams_and_no_other_gets_it(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        slots = []
        for gateway, instance in (("g", 1), ("g", 2), ("h", 1), ("g", 1)):
            watch = stub.WatchPipelines(watch_request(gateway, instance))
            slots.append((await until(watch, lambda _: True)).slot)
            watch.cancel()
        assert slots[3] == slots[0]
        assert len(set(slots)) == 3

    talk(coordinator.port, story)


def test_of_two_gateways_with_one_name_the_second_is_refused_until_the_first_is_gone(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        first = stub.WatchPipelines(watch_request("g", 1, life=7))
        await until(first, lambda _: True)
        refused = pytest.raises(ConfigError, match="another gateway named 'g' is connected: give each its own")
        with refused, rpc.mapped():
            await until(stub.WatchPipelines(watch_request("g", 2, life=8)), lambda _: True)
        # The same process asks for a fresh slot.
        again = stub.WatchPipelines(watch_request("g", 3, life=7))
        await until(again, lambda _: True)
        first.cancel()
        again.cancel()
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(ConfigError), rpc.mapped():
                    second = stub.WatchPipelines(watch_request("g", 4, life=8))
                    await until(second, lambda _: True)
                    break
                await asyncio.sleep(0.02)
        second.cancel()

    talk(coordinator.port, story)


def test_sigterm_ends_it_soon_with_streams_open(coordinator: Process) -> None:
    async def story(stub: Any) -> None:
        await stub.Register(introduction("w0"))
        renewing = Renewing(stub, "w0")
        watch = stub.WatchPipelines(watch_request())
        await until(watch, lambda m: "w0" in workers(m))
        begun = time.monotonic()
        status = await asyncio.to_thread(coordinator.stop, signal.SIGTERM)
        assert status == 0
        assert time.monotonic() - begun < 2.0  # half a second; the machine may have other things to do
        await renewing.end()
        watch.cancel()

    talk(coordinator.port, story)


def test_the_process_says_what_it_is(coordinator: Process) -> None:
    title = Path(f"/proc/{coordinator.popen.pid}/cmdline").read_bytes()
    assert title.startswith(b"stagemesh coordinator")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-pp", "5"], ["4 layers", "-pp 4"]),
        (["-pp", "2", "--layer-partition", "4,1"], ["adds up to 5", "2,2"]),
        (["--model", "/nowhere"], ["/nowhere", "no such directory"]),
    ],
)
def test_a_mesh_that_cannot_be_ends_with_status_2(
    start: Callable[..., Process], model: Path, arguments: list[str], words: list[str]
) -> None:
    process = start(
        "coordinator", "--model", str(model), "--load-format", "dummy", "--port", "0", *arguments, ready=False
    )
    assert process.popen.wait(20) == 2
    assert process.log is not None
    for word in words:
        assert word in process.log.read_text()


def test_a_port_in_use(start: Callable[..., Process], coordinator: Process, model: Path) -> None:
    second = start(
        "coordinator", "--model", str(model), "--load-format", "dummy", "--port", str(coordinator.port), ready=False
    )
    assert second.popen.wait(20) == 2
    assert second.log is not None
    assert f"127.0.0.1:{coordinator.port}" in second.log.read_text()


class TestRealWorkers:
    """With real stage workers on random weights."""

    def worker(self, start: Callable[..., Process], port: int, stage: int, *more: str) -> Process:
        return start(
            "stage", "--coordinator", f"127.0.0.1:{port}", "--worker-id", f"stage-{stage}", "--stage", str(stage),
            "--device", "cpu", "--transport", "tcp", "--threads", "1", "--kv-cache-gib", "0.05", *more,
        )  # fmt: skip

    def test_loss_restart_and_drain(self, start: Callable[..., Process], model: Path, tmp_path: Path) -> None:
        mesh = ("--model", str(model), "--load-format", "dummy", "-pp", "2", "--state-dir", str(tmp_path / "state"))
        coordinator = start("coordinator", *mesh, "--port", "0")
        port = coordinator.port
        stages = [self.worker(start, port, stage) for stage in (0, 1)]

        async def story(stub: Any) -> None:
            watch = stub.WatchPipelines(watch_request())
            served = (await until(watch, lambda m: m.pipelines[0].state == SERVING)).pipelines[0]
            assert [(s.worker_id, s.layers.first, s.layers.last) for s in served.stages] == [
                ("stage-0", 0, 2),
                ("stage-1", 2, 4),
            ]
            assert all(s.num_pages * served.limits.page_size >= served.limits.max_model_len for s in served.stages)
            assert served.stages[0].route

            # The coordinator is killed and started again: the pipeline is taken up as it is.
            coordinator.stop(signal.SIGKILL)
            with pytest.raises(grpc.RpcError):
                await until(watch, lambda _: False)
            await asyncio.to_thread(start, "coordinator", *mesh, "--port", str(port))
            watch = stub.WatchPipelines(watch_request(), wait_for_ready=True)
            again = (await until(watch, lambda _: True)).pipelines[0]
            assert (again.state, again.epoch) == (SERVING, served.epoch)
            assert again.stages == served.stages

            # A worker is killed: down within a second, with the reason; a new one brings it back.
            killed = time.monotonic()
            stages[1].stop(signal.SIGKILL)
            down = (await until(watch, lambda m: m.pipelines[0].state == DOWN)).pipelines[0]
            assert time.monotonic() - killed < 1.0
            assert "stage 1: worker stage-1 is lost" in down.reason
            assert down.epoch > served.epoch
            await asyncio.to_thread(self.worker, start, port, 1)
            back = (await until(watch, lambda m: m.pipelines[0].state == SERVING)).pipelines[0]
            assert back.epoch > down.epoch

            # Nobody can take its stage: a drain is refused, and nothing changes.
            with pytest.raises(ConfigError, match=r"nobody can take stage 0 of pipeline-0.*--force"), rpc.mapped():
                await stub.Drain(pb.DrainRequest(worker_id="stage-0"))
            # Forced, it keeps the epoch and names the worker.
            drained = await stub.Drain(pb.DrainRequest(worker_id="stage-0", force=True))
            assert list(drained.pipeline_ids) == ["pipeline-0"]
            draining = (await until(watch, lambda m: m.pipelines[0].state == DRAINING)).pipelines[0]
            assert (draining.epoch, "stage-0" in draining.reason) == (back.epoch, True)
            # And there is a way back.
            await stub.Undrain(pb.UndrainRequest(worker_id="stage-0"))
            undone = (await until(watch, lambda m: m.pipelines[0].state == SERVING)).pipelines[0]
            assert undone.epoch == back.epoch
            with pytest.raises(NotFound, match="worker stage-0 does not drain"), rpc.mapped():
                await stub.Undrain(pb.UndrainRequest(worker_id="stage-0"))

        talk(port, story, limit_s=200)

    def test_two_revisions_never_form_a_pipeline(
        self, start: Callable[..., Process], coordinator: Process, tmp_path: Path
    ) -> None:
        other = write_model(tmp_path / "other", rope_theta=5000.0)
        self.worker(start, coordinator.port, 0)
        self.worker(start, coordinator.port, 1, "--model", str(other))

        async def story(stub: Any) -> None:
            watch = stub.WatchPipelines(watch_request())
            refused = (await until(watch, lambda m: m.pipelines[0].final)).pipelines[0]
            assert refused.state == DOWN
            assert "worker stage-1 read revision" in refused.reason
            assert "the coordinator has" in refused.reason or "the coordinator and stage-0 have" in refused.reason
            assert refused.model.fingerprint[:12] in refused.reason

        talk(coordinator.port, story, limit_s=120)
