"""`stagemesh bench trace`: takes a trace of a mesh and writes its files."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import to_json

from stagemesh.errors import ConfigError, Unavailable, ungrouped
from stagemesh.fetch import fetch_json

from . import chrome, waterfall
from .cpu import CpuSampler, CpuUse
from .load import Driver, Load
from .mesh import temporary_mesh
from .options import TraceOptions
from .records import Trace, read
from .report import table
from .summary import Summary, summarize

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_LOAD = "16x128x64"
HTTP_TIMEOUT_S = 10.0
LOADED_TIMEOUT_S = 120.0


def run(options: TraceOptions, serve_flags: Sequence[str] | None) -> int:
    """Takes a trace, writes the files, prints the table. Raises StagemeshError.

    Args:
        serve_flags: flags of the `serve` that is started for the trace, or None to trace a running mesh.
    """
    url = options.url or DEFAULT_URL
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"--url {url!r} must begin with http:// or https://")
    text = options.load or (DEFAULT_LOAD if serve_flags is not None else None)
    load = Load.parse(text) if text is not None else None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out {options.out}: {e.strerror}") from e
    mesh = contextlib.nullcontext(url.rstrip("/")) if serve_flags is None else temporary_mesh(serve_flags)
    return asyncio.run(_run(options, mesh, load))


async def _run(options: TraceOptions, mesh: contextlib.AbstractAsyncContextManager[str], load: Load | None) -> int:
    task = asyncio.current_task()
    assert task is not None
    # A mesh that was started for the trace must end with this process.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        async with mesh as url:
            trace, use = await _take(options, url, load)
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    summary = summarize(trace)
    text = table(trace, summary, use)
    _write(options.out, trace, summary, use, text)
    if load is not None:
        print(f"load: {load.clients} requests at once, {load.input_tokens} tokens in, {load.output_tokens} out, "
              f"seed {options.seed}")  # fmt: skip
    print(text)
    print(f"\n{options.out / 'trace.json'}: open it in ui.perfetto.dev or chrome://tracing\n"
          f"{options.out / 'trace.svg'}: the same as a picture")  # fmt: skip
    return 0


async def _take(options: TraceOptions, url: str, load: Load | None) -> tuple[Trace, CpuUse | str]:
    """Returns the trace, and the CPU time or why it is not known.

    With a load, the trace begins when all clients have had a first token, and a failed request ends it.
    """
    sampler = CpuSampler()
    query = f"{url}/trace?steps={options.steps}&timeout={options.timeout:g}"
    within_s = options.timeout + HTTP_TIMEOUT_S
    with ungrouped():
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(sampler.run())]
            if load is not None:
                driver = await _driver(options, url, load)
                beside.append(group.create_task(driver.run()))
                await _answered(driver, load)
            raw = await asyncio.to_thread(fetch_json, query, within_s, api_key=options.api_key, post=True)
            for task in beside:
                task.cancel()
    trace = read(raw)
    return trace, sampler.use(trace)


async def _driver(options: TraceOptions, url: str, load: Load) -> Driver:
    models = await asyncio.to_thread(fetch_json, f"{url}/v1/models", HTTP_TIMEOUT_S, api_key=options.api_key)
    if not models["data"]:
        raise Unavailable(f"{url} serves no model yet; wait until {url}/readyz answers 200")
    return Driver(load, url, models["data"][0]["id"], options.api_key, options.seed)


async def _answered(driver: Driver, load: Load) -> None:
    try:
        async with asyncio.timeout(LOADED_TIMEOUT_S):
            await driver.answered.wait()
    except TimeoutError:
        raise Unavailable(
            f"not every one of {load.clients} clients had a first token after {LOADED_TIMEOUT_S:.0f} s; use fewer"
        ) from None


def _write(out: Path, trace: Trace, summary: Summary, use: CpuUse | str, text: str) -> None:
    told: dict[str, Any] = {"summary": summary, "table": text.splitlines()}
    if isinstance(use, CpuUse):
        told["cpu"] = asdict(use) | {"non_compute_share": use.non_compute_share}
    # NaN is not JSON.
    (out / "trace.json").write_bytes(to_json(chrome.document(trace, told), inf_nan_mode="null"))
    (out / "trace.svg").write_text(waterfall.draw(trace, summary))
