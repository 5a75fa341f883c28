"""A mesh for the time of a measurement: `stagemesh serve`, as a user would start it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from stagemesh.errors import ConfigError

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0
SHOWN_LINES = 15
ADDRESS = re.compile(rb"OpenAI API\s+(\S+)/v1")


@contextlib.asynccontextmanager
async def own_mesh(flags: Sequence[str]) -> AsyncIterator[str]:
    """The URL of a ready mesh that ends with the block. Raises ConfigError, with its last words, when it ends early."""
    with tempfile.TemporaryDirectory(prefix="stagemesh-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as err:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "stagemesh.cli.main", "serve", *flags,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=err,
                env={"STAGEMESH_LOG_LEVEL": "WARNING", **os.environ},
            )  # fmt: skip
        drain: asyncio.Task[None] | None = None
        try:
            assert process.stdout is not None
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    url = await _address(process.stdout)
            except TimeoutError:
                url = None
            if url is None:
                said = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
                raise ConfigError(f"the mesh did not start:\n{said}")
            drain = asyncio.create_task(_drain(process.stdout))
            yield url
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
            if drain is not None:
                await drain


async def _address(stdout: asyncio.StreamReader) -> str | None:
    """From the banner, which is printed once the mesh is ready."""
    while line := await stdout.readline():
        found = ADDRESS.search(line)
        if found:
            return found.group(1).decode()
    return None


async def _drain(stdout: asyncio.StreamReader) -> None:
    while await stdout.read(65536):
        pass
