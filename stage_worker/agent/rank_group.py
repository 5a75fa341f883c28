"""The rank processes of a worker, as its agent sees them: starts, calls and ends them, and notices when one dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from stagemesh.errors import InternalError, StageLost, Unavailable
from stagemesh.processes.child import ChildProcess, how_it_ended
from stagemesh.processes.cpu import CpuMeter, Patience, answered
from stagemesh.processes.frames import Decoder, pack, parse
from stagemesh.processes.launcher import Launcher
from stagemesh.protos.v1 import worker_pb2

from ..messages.control import READY_ID, Kind, error_of
from ..messages.heartbeat import Heartbeats, make_heartbeats
from ..messages.rank_config import RankConfig, RankDescriptors
from ..messages.shared_memory import make_shared_memory, make_store
from ..timing import StageTiming
from .watchdog import Watchdog

log = logging.getLogger(__name__)

END_LOOK_S = 0.01
READ_BYTES = 1 << 18

_idents = itertools.count(READY_ID + 1)
"""Ids are unique over all groups of this worker: a late frame of a lost group must not match a later session."""

OnFrame = Callable[[int, Kind, int, bytes], None]
M = TypeVar("M", bound=Message)


class RankGroup:
    """The ranks of one worker, from start to end. When one rank dies, the whole group is lost."""

    def __init__(
        self,
        configs: Sequence[RankConfig],
        function: str,
        on_frame: OnFrame,
        launcher: Launcher,
        timing: StageTiming,
    ) -> None:
        """`function` is the entry point of a rank, as for `Launcher.start`."""
        self.processes: list[ChildProcess] = []
        """The ranks started so far, in rank order."""
        self.ready: list[worker_pb2.RankReady] = []
        """The READY message of each rank."""
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Set to the reason when the group is lost."""
        self._configs = configs
        self._label = configs[0].label
        self._function = function
        self._on_frame = on_frame
        self._launcher = launcher
        self._timing = timing
        self._writers: list[asyncio.StreamWriter] = []
        self._readers: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None
        self._calls: dict[tuple[int, int], asyncio.Future[bytes]] = {}

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._configs)

    @property
    def up(self) -> bool:
        """Whether every rank has been ready once. The group may have been lost since then."""
        return len(self.ready) == self.size

    async def start(self) -> None:
        """Starts the ranks and waits until each is ready.

        Raises:
            ConfigError: a rank refuses its settings.
            StageLost: a process died, or is not ready in time. Another try may work.
        """
        controls = [socket.socketpair() for _ in range(self.size)]
        orders = [socket.socketpair() for _ in range(self.size - 1)]
        shared = make_heartbeats(self.size), make_shared_memory(self.size), make_store()
        up: list[asyncio.Future[bytes]] = []
        try:
            for rank, config in enumerate(self._configs):
                order = [pair[0] for pair in orders] if rank == 0 else [orders[rank - 1][1]]
                order_fds = tuple(sock.fileno() for sock in order)
                fds = RankDescriptors(controls[rank][1].fileno(), *shared, orders=order_fds)
                self.processes.append(await self._launcher.start(self._function, config.pack(), fds.in_order))
                reader, writer = await asyncio.open_unix_connection(sock=controls[rank][0])
                up.append(self._expect(rank, READY_ID))
                self._writers.append(writer)
                self._readers.append(asyncio.create_task(self._read(rank, reader)))
            self._watching = asyncio.create_task(self._watch(Heartbeats(os.dup(shared[0]), self.size)))
        except Unavailable as e:
            raise StageLost(e.message) from e
        finally:
            ours = [pair[0] for pair in controls[len(self._writers) :]]
            for end in [*ours, *(pair[1] for pair in controls), *(end for pair in orders for end in pair)]:
                end.close()
            for fd in shared:
                os.close(fd)
        self.ready += await asyncio.gather(*(self._until_up(rank, ready) for rank, ready in enumerate(up)))

    async def _until_up(self, rank: int, ready: asyncio.Future[bytes]) -> worker_pb2.RankReady:
        total_s = self._timing.ready_s
        patience = Patience(self.processes[rank].pid, total_s=total_s, idle_s=total_s, look_s=self._timing.look_s)
        try:
            return parse(worker_pb2.RankReady, await answered(ready, patience))
        except TimeoutError as e:
            raise StageLost(f"rank {rank} of {self._label} is not up after {total_s:.0f} s") from e

    async def _watch(self, memory: Heartbeats) -> None:
        """Kills a rank that hangs. The group is then lost as if the rank had died."""
        meters = [CpuMeter(process.pid) for process in self.processes]
        watchdog = Watchdog(memory, meters, self._timing, cuda=self._configs[0].device == "cuda")
        while not self.lost.done():
            self._launcher.reap()
            hang = watchdog.look()
            if hang is not None:
                log.error("rank %d of %s hangs: %s; it is killed", hang.rank, self._label, hang.why)
                self.processes[hang.rank].kill()
                self._lose(f"rank {hang.rank} of {self._label} did not go on")
            await asyncio.sleep(self._timing.look_s)

    # -- frames -----------------------------------------------------------------------------------------------------

    async def call(self, kind: Kind, request: Message, reply: type[M], timeout_s: float) -> list[M]:
        """Calls all ranks. Returns their replies in rank order; raises the first rank's error, or StageLost."""
        return await self.call_as(self.take_id(), kind, request, reply, timeout_s)

    async def call_as(self, ident: int, kind: Kind, request: Message, reply: type[M], timeout_s: float) -> list[M]:
        """`call` with an id from `take_id`."""
        waiting: list[asyncio.Future[bytes]] = []
        frame = pack(kind, ident, request.SerializeToString())
        try:
            for rank in range(self.size):
                self._write(rank, frame)
                waiting.append(self._expect(rank, ident))
            done, _ = await asyncio.wait(waiting, timeout=timeout_s)
            if len(done) < len(waiting):
                # The rank hangs with its sockets open: only a new group helps.
                self._lose(f"a rank of {self._label} did not answer {kind.name} within {timeout_s:.0f} s")
                raise StageLost(self.lost.result())
            return [parse(reply, future.result()) for future in waiting]
        finally:
            for rank in range(self.size):
                self._calls.pop((rank, ident), None)

    def _expect(self, rank: int, ident: int) -> asyncio.Future[bytes]:
        """Makes a future for a rank's reply. Its error counts as retrieved even if nobody awaits the future.

        The caller may have been cancelled, or may raise another rank's error.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._calls[rank, ident] = future
        return future

    def take_id(self) -> int:
        """A new id for a call or a session."""
        return next(_idents)

    async def run(self, session: int, message: bytes) -> None:
        """Sends a gateway's message to all ranks. Waits while they are slow to read."""
        frame = pack(Kind.RUN, session, message)
        for rank in range(self.size):
            self._write(rank, frame)
        for rank, writer in enumerate(self._writers):
            try:
                await writer.drain()
            except ConnectionError as e:
                raise StageLost(f"rank {rank} of {self._label} is gone") from e

    def _write(self, rank: int, frame: bytes) -> None:
        """Raises StageLost when the rank is gone, even before the group has noticed."""
        if self.lost.done():
            raise StageLost(self.lost.result())
        if self._writers[rank].is_closing():
            raise StageLost(f"rank {rank} of {self._label} is gone")
        self._writers[rank].write(frame)

    async def _read(self, rank: int, reader: asyncio.StreamReader) -> None:
        decoder = Decoder(Kind)
        try:
            while data := await reader.read(READ_BYTES):
                for kind, ident, payload in decoder.feed(data):
                    self._on_rank_frame(rank, kind, ident, payload)
        except ConnectionError:
            await self._on_gone(rank)
        except Exception as e:
            if not isinstance(e, InternalError):
                log.exception("a frame of rank %d could not be taken", rank)
            self._lose(f"a frame of rank {rank} of {self._label} could not be taken: {e}")
        else:
            await self._on_gone(rank)

    def _on_rank_frame(self, rank: int, kind: Kind, ident: int, payload: bytes) -> None:
        if kind not in (Kind.REPLY, Kind.ERROR, Kind.READY):
            self._on_frame(rank, kind, ident, payload)
            return
        future = self._calls.pop((rank, ident), None)
        if future is None or future.done():
            return
        if kind == Kind.ERROR:
            future.set_exception(error_of(parse(worker_pb2.Failure, payload)))
        else:
            future.set_result(payload)

    async def _on_gone(self, rank: int) -> None:
        process = self.processes[rank]
        deadline = asyncio.get_running_loop().time() + self._timing.stop_s
        while process.poll() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(END_LOOK_S)
        self._lose(f"rank {rank} of {self._label} {how_it_ended(process.poll())}")

    def _lose(self, reason: str) -> None:
        """Marks the group as lost and fails all calls under way."""
        if not self.lost.done():
            self.lost.set_result(reason)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(StageLost(reason))
        self._calls.clear()

    # -- the end ----------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Tells the ranks to end, kills those that do not end in time, and reaps all of them."""
        for rank in range(len(self._writers)):
            with contextlib.suppress(ConnectionError, StageLost):
                self._write(rank, pack(Kind.SHUTDOWN, 0))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timing.stop_s
        while any(p.poll() is None for p in self.processes) and loop.time() < deadline and not self.lost.done():
            await asyncio.sleep(END_LOOK_S)
        for process in self.processes:
            process.kill()
            process.wait(self._timing.stop_s)
        tasks = [*self._readers, *([self._watching] if self._watching is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        for future in self._calls.values():
            if not future.done():
                future.cancel()
