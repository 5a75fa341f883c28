"""Finds the files of the layers that a worker should load, and fetches those of a hub model that are not there."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from stagemesh import checkpoint
from stagemesh.errors import ConfigError, Unavailable
from stagemesh.hub.checkpoint import present
from stagemesh.hub.reference import HubModel, parse
from stagemesh.processes import frames
from stagemesh.processes.launcher import Launcher
from stagemesh.protos.v1 import stage_pb2, types_pb2, worker_pb2
from stagemesh.settings.stage import StageSettings

from ..messages.control import error_of
from ..timing import StageTiming
from .fetch_process import FetchKind

log = logging.getLogger(__name__)

FETCH = "stagemesh.stage_worker.agent.fetch_process:run"
READ_BYTES = 1 << 16

Request = stage_pb2.AssignRequest | stage_pb2.PrepareRequest
Layers = tuple[int, int]
Stamps = dict[str, tuple[int, int, int]]
"""Path -> size, time of change and inode. They are equal before and after a load if no file was changed meanwhile."""
Tell = Callable[[int, int], None]
"""Is told (bytes that are fetched, bytes in all)."""


class CheckpointFiles:
    """Finds files for the assignments of one worker."""

    def __init__(self, settings: StageSettings, launcher: Launcher, timing: StageTiming) -> None:
        self._settings, self._launcher, self._timing = settings, launcher, timing
        self._changes = 0
        """How often files were changed during a load."""

    async def find(self, request: Request, tell: Tell) -> Stamps:
        """Sets path and fingerprint of the request's models to those on this machine. Tells the progress of a download.

        Returns the stamps of the files, for `check_unchanged`. Raises ConfigError, CheckpointError and Unavailable.
        """
        stamps: Stamps = {}
        model = request.model
        self._choose(model)
        layers = request.layers.first, request.layers.last
        await self._find(model, layers, tell, stamps)
        if model.HasField("draft") and layers[1] == model.num_layers:
            draft = model.draft.model
            await self._find(draft, (0, draft.num_layers), tell, stamps)
        return stamps

    def order(self, request: Request) -> Request:
        """Returns the request for the ranks. They use weights in memory again that have the same fingerprint."""
        order = copy.deepcopy(request)
        if self._changes:  # What was loaded meanwhile may be of neither version.
            order.model.fingerprint += f"+{self._changes}"
        return order

    async def check_unchanged(self, before: Stamps) -> None:
        """Checks after a load that the files are those that `find` saw. Raises Unavailable if they are not."""
        after: Stamps = {}
        for folder in {str(Path(path).parent) for path in before}:
            after |= await asyncio.to_thread(_stamps, folder)
        if changed := sorted(path for path, stamp in before.items() if after.get(path) != stamp):
            self._changes += 1
            raise Unavailable(f"{changed[0]} was changed while it was loaded: it must be loaded again", retry_after_s=1)

    def _choose(self, model: types_pb2.ModelRef) -> None:
        """Names the model that --model does, if it is given. Raises ConfigError for one that cannot be the same."""
        if self._settings.model is None:
            return
        told, theirs = self._settings.model, f"{model.repo}@{model.commit}" if model.repo else model.path
        own = parse(told, self._settings.revision)
        if (own is None) == bool(model.repo) or (own is not None and own.commit not in (None, model.commit)):
            raise ConfigError(
                f"--model {own or told} of this worker is not the coordinator's {theirs}: leave it out, or give both "
                "the same folder, or the same model on a hub"
            )
        if own is None:
            model.path = told
        else:
            model.repo = own.repo

    async def _find(self, model: types_pb2.ModelRef, layers: Layers, tell: Tell, stamps: Stamps) -> None:
        theirs = model.fingerprint
        if not model.repo:
            stamps |= await asyncio.to_thread(_stamps, model.path)
            # The fingerprint is computed here: the coordinator's directory of the same name may differ.
            model.fingerprint = await asyncio.to_thread(checkpoint.fingerprint, model.path, model.load_format)
            if theirs and theirs != model.fingerprint:
                log.warning("checkpoint %s has fingerprint %s here, %s there", model.path, model.fingerprint, theirs)
            return
        hub, wanted = HubModel(model.repo, model.commit), layers if model.load_format != "dummy" else None
        folder = await asyncio.to_thread(present, hub, wanted, model.num_layers)
        if folder is None:
            await self._fetch(hub, wanted, model.num_layers, tell)
            folder = await asyncio.to_thread(present, hub, wanted, model.num_layers)
            if folder is None:
                raise Unavailable(f"files of {hub} that were just fetched are gone from the cache: fetching them again")
        model.path, model.fingerprint = str(folder), hub.fingerprint
        stamps |= await asyncio.to_thread(_stamps, model.path)

    async def _fetch(self, model: HubModel, layers: Layers | None, num_layers: int, tell: Tell) -> None:
        """Runs a process that fetches files. Kills it if it brings no byte for long, or if this is cancelled."""
        request = worker_pb2.FetchRequest(
            repo=model.repo, commit=model.revision, num_layers=num_layers, time_scale=self._settings.time_scale
        )
        if layers is not None:
            request.layers.first, request.layers.last = layers
        ours, theirs = socket.socketpair()
        with theirs:
            child = self._launcher.spawn(FETCH, request.SerializeToString(), [theirs.fileno()])
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        log.info("fetching what layers %s of %s need", layers, model)
        try:
            async for kind, payload in self._frames(reader, model):
                if kind is FetchKind.DONE:
                    return
                if kind is FetchKind.FAILED:
                    raise error_of(frames.parse(worker_pb2.Failure, payload))
                progress = frames.parse(worker_pb2.FetchProgress, payload)
                tell(progress.fetched_bytes, progress.total_bytes)
        finally:
            writer.close()
            child.kill()
            await asyncio.to_thread(child.wait, self._timing.stop_s)

    async def _frames(self, reader: asyncio.StreamReader, model: HubModel) -> AsyncIterator[tuple[FetchKind, bytes]]:
        decoder, silence_s = frames.Decoder(FetchKind), self._timing.fetch_silence_s
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    data = await reader.read(READ_BYTES)
            except TimeoutError:
                raise Unavailable(f"no byte of {model} came for {silence_s:.0f} s") from None
            if not data:
                raise Unavailable(f"the process that fetched {model} ended")
            for kind, _, payload in decoder.feed(data):
                yield kind, payload


def _stamps(folder: str) -> Stamps:
    """Returns the stamps of the files that a load may read, as far as they are there. It reads no file."""
    found = {}
    names = (checkpoint.CONFIG, checkpoint.MODELOPT, checkpoint.INDEX)
    for path in (*(Path(folder) / name for name in names), *Path(folder).rglob("*.safetensors")):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found[str(path)] = stat.st_size, stat.st_mtime_ns, stat.st_ino
    return found
