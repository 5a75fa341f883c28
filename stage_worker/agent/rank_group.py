"""The agent's side of its rank processes: starts them, calls them, passes frames on, and notices when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

from stagemesh.errors import ConfigError, StageLost
from stagemesh.protos.v1 import types_pb2
from stagemesh.settings.stage import StageSettings

from ..messages.control import HEADER, Kind, pack, unpack_error
from ..messages.heartbeat import STARVED_S, Doing, HeartWatch, doing, make_heartbeats
from ..messages.rank_config import RankConfig
from ..messages.shared_memory import make_shared_memory, make_store
from .rank_starter import RankProcess, RankStarter

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 2.0
LOOK_S = 0.1
"""How often the ranks' heartbeats are looked at."""
LATE_S = 2.0
"""How late a rank may be while a call is out."""

_idents = itertools.count(1)
"""Over all groups of this worker: a late message about a session of a lost group must not meet one of the next."""

OnFrame = Callable[[int, Kind, int, bytes], None]


@dataclass(frozen=True)
class RankReady:
    """What a rank said when it was up."""

    device: types_pb2.DeviceInfo
    addresses: dict[str, bytes]


class RankGroup:
    """The rank processes of one worker, from start to end. When one dies the whole group is lost."""

    def __init__(
        self, settings: StageSettings, device: str, label: str, on_frame: OnFrame, starter: RankStarter
    ) -> None:
        self._settings = settings
        self._device = device
        self._label = label
        self._on_frame = on_frame
        self._starter = starter
        self._processes: list[RankProcess] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._readers: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        self._calls: dict[tuple[int, int], asyncio.Future[bytes]] = {}
        self.ready: list[RankReady] = []
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set to the reason when a rank is gone."""

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self._settings.tensor_parallel_size

    @property
    def up(self) -> bool:
        """Whether every rank came to take orders; the group may be lost since."""
        return len(self.ready) == self.size

    async def start(self) -> None:
        """Starts the ranks and waits until each is up. Raises ConfigError with the first rank's reason."""
        controls = [socket.socketpair() for _ in range(self.size)]
        orders = [socket.socketpair() for _ in range(self.size - 1)]
        shared = make_shared_memory(self.size) if self.size > 1 and self._device != "cuda" else None
        store = make_store() if self.size > 1 else None
        hearts = make_heartbeats(self.size)
        up: list[asyncio.Future[bytes]] = []
        try:
            for rank in range(self.size):
                order = [pair[0] for pair in orders] if rank == 0 else [orders[rank - 1][1]]
                order = order if self.size > 1 else []
                await self._start_rank(rank, controls[rank][1], order, hearts, shared, store)
                reader, writer = await asyncio.open_unix_connection(sock=controls[rank][0])
                up.append(self._expect(rank, 0))
                self._writers.append(writer)
                self._readers.append(asyncio.create_task(self._read(rank, reader)))
            self._watching = asyncio.create_task(self._watch(HeartWatch(hearts, self.size, LOOK_S)))
        finally:
            ours = [pair[0] for pair in controls[len(self._writers) :]]
            for end in [*ours, *(pair[1] for pair in controls), *(end for pair in orders for end in pair)]:
                end.close()
            for fd in (hearts, shared, store):
                if fd is not None:
                    os.close(fd)
        try:
            # Not `wait_for`, which takes nobody's error from a `gather` that it cancels.
            async with asyncio.timeout(READY_TIMEOUT_S):
                said = await asyncio.gather(*up)
        except TimeoutError as e:
            raise ConfigError(f"a rank of {self._label} was not up after {READY_TIMEOUT_S:.0f} s") from e
        for payload in said:
            values = json.loads(payload)
            self.ready.append(
                RankReady(
                    types_pb2.DeviceInfo.FromString(bytes.fromhex(values["device"])),
                    {name: bytes.fromhex(address) for name, address in values["addresses"].items()},
                )
            )

    async def _watch(self, hearts: HeartWatch) -> None:
        """Kills a rank that hangs, which is then lost like one that died; or the group, of which none goes on."""
        while not self.lost.done():
            look = hearts.look(self._doing)
            for rank, overdue_s in look.overdue:
                # A rank that carries out a call has said so; one that loads beside may be late, and one that has not
                # taken the call at all hangs.
                if self._calls and overdue_s <= LATE_S:
                    continue
                if overdue_s <= STARVED_S and self._doing(rank).blameless:
                    continue
                if hearts.wrote(rank):
                    continue
                self._hangs(rank, f"{overdue_s:.1f} s overdue")
                return
            if look.stopped:
                self._hangs(look.stopped[0], "it is stopped")
                return
            # On CUDA devices nobody can tell: the work is the device's.
            if look.rests and self._device != "cuda":
                self._hangs(0, "no rank runs")
                return
            await asyncio.sleep(LOOK_S)

    def _doing(self, rank: int) -> Doing:
        return doing(self._processes[rank].pid)

    def _hangs(self, rank: int, why: str) -> None:
        log.error("rank %d of %s hangs: %s; it is killed", rank, self._label, why)
        self._processes[rank].kill()
        self._lose(f"rank {rank} of {self._label} did not go on")

    async def _start_rank(
        self,
        rank: int,
        control: socket.socket,
        order: list[socket.socket],
        hearts: int,
        shared: int | None,
        store: int | None,
    ) -> None:
        s = self._settings
        config = replace(
            RankConfig.of_worker(self._label, s, self._device),
            rank=rank,
            control_fd=control.fileno(),
            order_fds=[sock.fileno() for sock in order],
            heart_fd=hearts,
            cpus=_cpus_of(s.cpu_list, rank),
            idle_cpus=_cpus_of(s.idle_cpu_list, rank),
            exchange_fd=shared,
            store_fd=store,
        )
        self._processes.append(await self._starter.start(config))

    # -- frames -----------------------------------------------------------------------------------------------------

    async def call(self, kind: Kind, payload: bytes, timeout_s: float, rank: int | None = None) -> list[bytes]:
        """Calls one rank, or all; the replies in rank order. Raises the first rank's error, StageLost when one dies."""
        return await self.call_as(self.take_id(), kind, payload, timeout_s, rank)

    async def call_as(
        self, ident: int, kind: Kind, payload: bytes, timeout_s: float, rank: int | None = None
    ) -> list[bytes]:
        """`call` under an id that the caller took from `take_id`."""
        ranks = range(self.size) if rank is None else [rank]
        waiting: list[asyncio.Future[bytes]] = []
        try:
            for r in ranks:
                self._write(r, pack(kind, ident, payload))
                waiting.append(self._expect(r, ident))
            done, _ = await asyncio.wait(waiting, timeout=timeout_s)
            if len(done) < len(waiting):
                # It hangs, with its sockets open: only the end of the group helps.
                self._lose(f"a rank of {self._label} did not answer {kind.name} within {timeout_s:.0f} s")
                raise StageLost(self.lost.result())
            return [future.result() for future in waiting]
        finally:
            for r in ranks:
                self._calls.pop((r, ident), None)

    def _expect(self, rank: int, ident: int) -> asyncio.Future[bytes]:
        """The reply that is to come. asyncio is kept from reporting an error that nobody asks for: the caller may have
        been cancelled, or raise another rank's."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._calls[rank, ident] = future
        return future

    def take_id(self) -> int:
        """A fresh id for a call or a session."""
        return next(_idents)

    async def run(self, session: int, message: bytes) -> None:
        """Passes a gateway's message to all ranks; waits when they are slow to read."""
        frame = pack(Kind.RUN, session, message)
        for rank in range(self.size):
            self._write(rank, frame)
        for rank, writer in enumerate(self._writers):
            try:
                await writer.drain()
            except ConnectionError as e:
                raise StageLost(f"rank {rank} of {self._label} is gone") from e

    def _write(self, rank: int, frame: bytes) -> None:
        """Raises StageLost when the rank is gone, though its end may not have been noticed yet."""
        if self.lost.done():
            raise StageLost(self.lost.result())
        if self._writers[rank].is_closing():
            raise StageLost(f"rank {rank} of {self._label} is gone")
        self._writers[rank].write(frame)

    async def _read(self, rank: int, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                size, kind, ident = HEADER.unpack(await reader.readexactly(HEADER.size))
                payload = await reader.readexactly(size) if size else b""
                self._on_rank_frame(rank, Kind(kind), ident, payload)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._on_gone(rank)
        except Exception as e:
            log.exception("a frame of rank %d could not be taken", rank)
            self._lose(f"a frame of rank {rank} of {self._label} could not be taken: {e}")

    def _on_rank_frame(self, rank: int, kind: Kind, ident: int, payload: bytes) -> None:
        if kind not in (Kind.REPLY, Kind.ERROR, Kind.READY):
            self._on_frame(rank, kind, ident, payload)
            return
        future = self._calls.pop((rank, ident), None)
        if future is None or future.done():
            return
        if kind == Kind.ERROR:
            future.set_exception(unpack_error(payload))
        else:
            future.set_result(payload)

    async def _on_gone(self, rank: int) -> None:
        process = self._processes[rank]
        deadline = asyncio.get_running_loop().time() + STOP_TIMEOUT_S
        while process.poll() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        code = process.poll()
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        self._lose(f"rank {rank} of {self._label} {how}")

    def _lose(self, reason: str) -> None:
        """The group is lost: whoever waits for a reply learns it."""
        if not self.lost.done():
            self.lost.set_result(reason)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(StageLost(reason))
        self._calls.clear()

    # -- the end ----------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Asks the ranks to end, kills those that do not, and reaps all."""
        for rank in range(len(self._writers)):
            with contextlib.suppress(ConnectionError, StageLost):
                self._write(rank, pack(Kind.SHUTDOWN, 0))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + STOP_TIMEOUT_S
        while any(p.poll() is None for p in self._processes) and loop.time() < deadline and not self.lost.done():
            await asyncio.sleep(0.01)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        tasks = [*self._readers, *([self._watching] if self._watching is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        for future in self._calls.values():
            if not future.done():
                future.cancel()


def _cpus_of(cpu_list: str | None, rank: int) -> list[int]:
    """Cores of one rank from vLLM's notation: `0-3|4-7` pins rank 0 to 0..3 and rank 1 to 4..7."""
    if not cpu_list:
        return []
    groups = cpu_list.split("|")
    try:
        cpus: list[int] = []
        for part in filter(None, groups[rank % len(groups)].split(",")):
            low, _, high = part.partition("-")
            cpus.extend(range(int(low), int(high or low) + 1))
    except ValueError:
        raise ConfigError(f"cpu_list {cpu_list!r} is not of the form 0-3|4-7") from None
    return cpus
