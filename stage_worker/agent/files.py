"""Finds the files of the layers that a worker should load, and fetches those of a hub model that are not there."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable

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
Tell = Callable[[int, int], None]
"""Is told (bytes that are fetched, bytes in all)."""


class CheckpointFiles:
    """Finds files for the assignments of one worker."""

    def __init__(self, settings: StageSettings, launcher: Launcher, timing: StageTiming) -> None:
        self._settings, self._launcher, self._timing = settings, launcher, timing

    async def find(self, request: Request, tell: Tell) -> None:
        """Sets path and fingerprint of the request's models to those on this machine. Tells the progress of a download.

        Raises ConfigError, CheckpointError and Unavailable.
        """
        model = request.model
        self._choose(model)
        layers = request.layers.first, request.layers.last
        await self._find(model, layers, tell)
        if model.HasField("draft") and layers[1] == model.num_layers:
            draft = model.draft.model
            await self._find(draft, (0, draft.num_layers), tell)

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

    async def _find(self, model: types_pb2.ModelRef, layers: Layers, tell: Tell) -> None:
        theirs = model.fingerprint
        if not model.repo:
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
