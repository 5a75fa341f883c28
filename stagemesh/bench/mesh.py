"""Starts a mesh for the time of a measurement, by `stagemesh serve` as a user would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence

from stagemesh.errors import ConfigError

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0
ADDRESS = re.compile(rb"OpenAI API\s+(\S+)/v1")


@contextlib.asynccontextmanager
async def temporary_mesh(flags: Sequence[str]) -> AsyncIterator[str]:
    """Starts a mesh, yields its URL when it is ready, and ends it after the block. Its log goes to stderr.

    Raises ConfigError when it ends early or is not ready in time.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "stagemesh.cli.main", "serve", *flags,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        env={"STAGEMESH_LOG_LEVEL": "WARNING", **os.environ},
    )  # fmt: skip
    drain: asyncio.Task[None] | None = None
    try:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                url = await _address(process.stdout)
        except TimeoutError:
            raise ConfigError(f"the mesh is not ready after {START_TIMEOUT_S:.0f} s") from None
        if url is None:
            raise ConfigError(f"the mesh did not start (exit status {await process.wait()}); its message is above")
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
    """The URL in the banner, which is printed when the mesh is ready; None when the mesh ended before."""
    while line := await stdout.readline():
        found = ADDRESS.search(line)
        if found:
            return found.group(1).decode()
    return None


async def _drain(stdout: asyncio.StreamReader) -> None:
    while await stdout.read(65536):
        pass
