"""Starts a mesh for a measurement, with `stagemesh serve` as a user would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence

from stagemesh.errors import ConfigError

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0


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
    assert process.stdout is not None
    try:
        # The banner is printed when the mesh is ready.
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                banner = await process.stdout.readuntil(b"/v1\n")
        except TimeoutError:
            raise ConfigError(f"the mesh is not ready after {START_TIMEOUT_S:.0f} s") from None
        except asyncio.IncompleteReadError:
            raise ConfigError(
                f"the mesh did not start (exit status {await process.wait()}); its message is above"
            ) from None
        yield banner.split()[-1].removesuffix(b"/v1").decode()
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
