"""Coordinators on one Kubernetes Lease: one is the leader, has epochs of its own, and ends where it lost the Lease."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lease_server import LeaseServer, lease_server
from services import free_port, wait_for

from stagemesh import rpc
from stagemesh.coordinator.state.kubernetes_lease import EPOCHS_OF_A_TERM, ApiServer, Lease
from stagemesh.errors import ConfigError
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from stagemesh.settings.model import DEMO_MODEL

NAME, DURATION_S = "mesh", 3.0


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LeaseServer]:
    with lease_server(tmp_path / "account") as told:
        for name, value in told.environment.items():
            monkeypatch.setenv(name, value)
        yield told


@contextlib.contextmanager
def stagemesh(log: Path, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        command = [sys.executable, "-m", "stagemesh.cli.main", *args]
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=os.environ.copy())
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def coordinator(
    api: LeaseServer, log: Path, port: int, identity: str
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """One with a state of its own, as a pod without a volume has it."""
    return stagemesh(
        log, "coordinator", "--model", str(DEMO_MODEL), "--port", str(port), "--kubernetes-lease", NAME,
        "--kubernetes-account", str(api.account), "--lease-duration", str(DURATION_S), "--lease-identity", identity,
    )  # fmt: skip


async def serving_epoch(port: int) -> int:
    """Once a pipeline serves."""
    channel = rpc.channel(f"127.0.0.1:{port}")
    request = coordinator_pb2.WatchPipelinesRequest(gateway_id="looks", instance=1, protocol=3)
    try:
        async with asyncio.timeout(30):
            async for response in coordinator_pb2_grpc.CoordinatorStub(channel).WatchPipelines(request):
                for view in response.pipelines:
                    if view.state == types_pb2.PIPELINE_STATE_SERVING:
                        return int(view.epoch)
    finally:
        await channel.close(None)
    raise AssertionError("the coordinator ended the stream")


def test_the_next_one_waits_until_it_expired_and_has_epochs_of_its_own(api: LeaseServer, tmp_path: Path) -> None:
    port, first_log, second_log = free_port(), tmp_path / "first", tmp_path / "second"
    worker = ["stage", "--coordinator", f"127.0.0.1:{port}", "--transport", "tcp", "--device", "cpu"]
    with coordinator(api, first_log, port, "one") as first, stagemesh(tmp_path / "worker", *worker):
        wait_for(first_log, "coordinator listens")
        assert asyncio.run(serving_epoch(port)) // EPOCHS_OF_A_TERM == 1
        with coordinator(api, second_log, port, "two") as second:
            wait_for(second_log, "held by one; this coordinator waits until it is free")
            first.kill()
            killed = time.monotonic()
            wait_for(second_log, "coordinator listens", timeout_s=DURATION_S + 5)
            assert time.monotonic() - killed > DURATION_S / 2
            # Its state is empty, and yet it gives the worker its layers at an epoch that there never was.
            assert asyncio.run(serving_epoch(port)) // EPOCHS_OF_A_TERM == 2
            assert second.poll() is None


def test_one_that_is_told_to_end_gives_it_up_at_once(api: LeaseServer, tmp_path: Path) -> None:
    with coordinator(api, tmp_path / "first", 0, "one") as first:
        wait_for(tmp_path / "first", "coordinator listens")
        with coordinator(api, tmp_path / "second", 0, "two") as second:
            wait_for(tmp_path / "second", "waits until it is free")
            first.send_signal(signal.SIGTERM)
            assert first.wait(10) == 0
            wait_for(tmp_path / "second", "coordinator listens", timeout_s=DURATION_S / 2)
            assert api.holder(NAME) == "two"
            assert second.poll() is None


def test_a_pod_whose_container_is_started_again_need_not_wait(api: LeaseServer, tmp_path: Path) -> None:
    """The same identity: what it was before is dead."""
    with coordinator(api, tmp_path / "first", 0, "pod") as first:
        wait_for(tmp_path / "first", "coordinator listens")
        first.kill()
        with coordinator(api, tmp_path / "second", 0, "pod"):
            wait_for(tmp_path / "second", "term 2")
            assert "waits" not in (tmp_path / "second").read_text()


def test_one_that_cannot_renew_ends_before_another_may_begin(api: LeaseServer, tmp_path: Path) -> None:
    log = tmp_path / "first"
    with coordinator(api, log, 0, "one") as first:
        wait_for(log, "coordinator listens")
        api.away = True
        assert first.wait(DURATION_S + 5) == 1
        assert time.monotonic() < api.wrote_at + DURATION_S
        assert "no longer the leader: Lease mesh could not be renewed for 2 s" in log.read_text()


def test_one_that_was_stopped_ends_when_it_goes_on(api: LeaseServer, tmp_path: Path) -> None:
    with coordinator(api, tmp_path / "first", 0, "one") as first:
        wait_for(tmp_path / "first", "coordinator listens")
        first.send_signal(signal.SIGSTOP)
        with coordinator(api, tmp_path / "second", 0, "two"):
            wait_for(tmp_path / "second", "coordinator listens")
            first.send_signal(signal.SIGCONT)
            assert first.wait(10) == 1
            assert "no longer the leader" in (tmp_path / "first").read_text()
            assert api.holder(NAME) == "two"


def test_what_a_role_must_allow_is_said(api: LeaseServer, tmp_path: Path) -> None:
    api.allowed = False
    with coordinator(api, tmp_path / "log", 0, "one") as process:
        assert process.wait(20) != 0
    said = (tmp_path / "log").read_text()
    assert "answers 403" in said
    assert "get, create and update of leases" in said
    assert "Traceback" not in said


def test_outside_a_pod(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder of a service account"):
        ApiServer(str(tmp_path), 2.0)


class TestLease:
    """What processes show by chance only."""

    def _lease(self, api: LeaseServer, identity: str) -> Lease:
        return Lease(ApiServer(str(api.account), 2.0), NAME, identity, 1.0)

    def test_of_two_that_try_at_once_one_gets_it(self, api: LeaseServer) -> None:
        async def both() -> None:
            one, two = self._lease(api, "one"), self._lease(api, "two")
            stop = asyncio.Event()
            tasks = [asyncio.create_task(lease.take(stop)) for lease in (one, two)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            assert sorted(await asyncio.gather(*tasks)) == [False, True]

        asyncio.run(both())
        assert api.leases[NAME]["spec"]["leaseTransitions"] == 1

    def test_a_write_whose_answer_is_lost_is_its_own_yet(self, api: LeaseServer) -> None:
        async def story() -> None:
            lease = self._lease(api, "one")
            assert await lease.take(asyncio.Event())
            api.forgets = 1
            kept = asyncio.create_task(lease.keep())
            writes = api.writes
            async with asyncio.timeout(10):
                while api.writes < writes + 3:
                    await asyncio.sleep(0.01)
            assert not kept.done()
            kept.cancel()

        asyncio.run(story())

    def test_another_holder_is_seen_at_the_next_renewal(self, api: LeaseServer) -> None:
        async def story() -> str:
            lease = self._lease(api, "one")
            assert await lease.take(asyncio.Event())
            with api.lock:
                api.leases[NAME]["spec"]["holderIdentity"] = "two"
                api.leases[NAME]["metadata"]["resourceVersion"] = "of another"
            return await lease.keep()

        assert asyncio.run(story()) == f"Lease {NAME} has another holder, or was deleted"

    def test_one_that_is_deleted_is_nobodys(self, api: LeaseServer) -> None:
        async def story() -> str:
            lease = self._lease(api, "one")
            assert await lease.take(asyncio.Event())
            with api.lock:
                del api.leases[NAME]
            return await lease.keep()

        assert "was deleted" in asyncio.run(story())

    def test_why_it_cannot_be_renewed_is_told(self, api: LeaseServer) -> None:
        async def story() -> str:
            lease = self._lease(api, "one")
            assert await lease.take(asyncio.Event())
            assert lease.is_sure
            api.allowed = False
            why = await lease.keep()
            assert not lease.is_sure
            return why

        assert "answers 403" in asyncio.run(story())

    def test_it_is_given_up_also_where_a_renewal_was_under_way(self, api: LeaseServer) -> None:
        async def story() -> None:
            lease = self._lease(api, "one")
            assert await lease.take(asyncio.Event())
            with api.lock:
                # It was written, and its answer is still to be read.
                api.leases[NAME]["metadata"]["resourceVersion"] = "later"
            await lease.give_up()

        asyncio.run(story())
        assert api.holder(NAME) == ""

    def test_a_term_begins_above_all_epochs_of_the_one_before(self, api: LeaseServer) -> None:
        async def story() -> tuple[int, int]:
            one, two = self._lease(api, "one"), self._lease(api, "two")
            assert await one.take(asyncio.Event())
            await one.give_up()
            assert await two.take(asyncio.Event())
            async with asyncio.timeout(10 * DURATION_S):
                assert "has another holder" in await one.keep()
            return one.first_epoch, two.first_epoch

        first, second = asyncio.run(story())
        assert second - first == EPOCHS_OF_A_TERM
