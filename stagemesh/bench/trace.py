"""`stagemesh bench trace`: takes a trace of a mesh and writes its files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stagemesh import process
from stagemesh.errors import ConfigError, InvalidRequest, StagemeshError, Unavailable

from . import chrome, cpu, waterfall
from .load import Driver, Load
from .mesh import temporary_mesh
from .records import Trace, read
from .report import table
from .summary import Summary, summarize

DEFAULT_LOAD = "16x128x64"
HTTP_TIMEOUT_S = 10.0
LOADED_TIMEOUT_S = 120.0
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class TraceOptions:
    """The options of the command line."""

    url: str
    serve_flags: Sequence[str] | None
    """Flags of the `serve` that is started for the trace; None: a running mesh is traced."""
    steps: int
    timeout_s: float
    load: str | None
    seed: int
    api_key: str | None
    out: Path


def run(options: TraceOptions) -> int:
    """Takes a trace, writes the files, prints the table. Raises StagemeshError."""
    if urlsplit(options.url).scheme not in ("http", "https"):
        raise ConfigError(f"--url {options.url!r} must begin with http:// or https://")
    load = options.load or (DEFAULT_LOAD if options.serve_flags is not None else None)
    wanted = Load.parse(load) if load is not None else None
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out {options.out}: {e.strerror}") from e
    return asyncio.run(_run(options, wanted))


async def _run(options: TraceOptions, load: Load | None) -> int:
    task = asyncio.current_task()
    assert task is not None
    # A mesh that was started for the trace must end with this process.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        async with _mesh(options) as url:
            trace, use, missing = await _take(options, url, load)
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    summary = summarize(trace)
    text = table(trace, summary, use, missing)
    _write(options.out, trace, summary, use, text)
    if load is not None:
        print(f"load: {load.clients} requests at once, {load.input_tokens} tokens in, {load.output_tokens} out, "
              f"seed {options.seed}")  # fmt: skip
    print(text)
    print(f"\n{options.out / 'trace.json'}: open it in ui.perfetto.dev or chrome://tracing\n"
          f"{options.out / 'trace.svg'}: the same as a picture")  # fmt: skip
    return 0


@contextlib.asynccontextmanager
async def _mesh(options: TraceOptions) -> AsyncIterator[str]:
    if options.serve_flags is None:
        yield options.url.rstrip("/")
        return
    async with temporary_mesh(options.serve_flags) as url:
        yield url


async def _take(options: TraceOptions, url: str, load: Load | None) -> tuple[Trace, cpu.CpuUse | None, str]:
    """(trace, CPU time, why it is not known)."""
    sampler, missing = _sampler(url)
    query = f"{url}/trace?steps={options.steps}&timeout={options.timeout_s:g}"
    async with _loaded(options, url, load), _running(sampler.run() if sampler is not None else None):
        raw = await asyncio.to_thread(_fetch, query, options.api_key, options.timeout_s + HTTP_TIMEOUT_S, post=True)
    trace = read(raw)
    if sampler is None:
        return trace, None, missing
    if trace.gateway_pid not in sampler.gateways or trace.boot_id != process.boot_id():
        return trace, None, "not known: the gateway that answered runs on another host"
    return trace, sampler.use(trace), f"not known: the trace is shorter than two samples, {cpu.SAMPLE_S} s apart"


def _sampler(url: str) -> tuple[cpu.CpuSampler | None, str]:
    parts = urlsplit(url)
    if parts.hostname not in LOCAL_HOSTS:
        return None, "not known: the server is not on this machine"
    sampler = cpu.local_mesh(parts.port or 80)
    return sampler, "not known: only of a mesh that `stagemesh serve` started here, as the same user"


@contextlib.asynccontextmanager
async def _loaded(options: TraceOptions, url: str, load: Load | None) -> AsyncIterator[None]:
    """Runs the load beside the block, which starts when all clients have had a first token. A failed request ends
    it."""
    if load is None:
        yield
        return
    models = await asyncio.to_thread(_fetch, f"{url}/v1/models", options.api_key, HTTP_TIMEOUT_S)
    if not models["data"]:
        raise Unavailable(f"{url} serves no model yet; wait until {url}/readyz answers 200")
    driver = Driver(load, url, models["data"][0]["id"], options.api_key, options.seed)
    async with _running(driver.run()):
        try:
            async with asyncio.timeout(LOADED_TIMEOUT_S):
                await driver.answered.wait()
        except TimeoutError:
            raise Unavailable(
                f"not every one of {load.clients} clients had a first token after {LOADED_TIMEOUT_S:.0f} s; use fewer"
            ) from None
        yield


@contextlib.asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    """Runs a coroutine beside the block. An error of the coroutine ends the block."""
    if work is None:
        yield
        return
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work)
            yield
            task.cancel()
    except* StagemeshError as group_of:
        error: BaseException = group_of
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _fetch(url: str, api_key: str | None, timeout_s: float, *, post: bool = False) -> Any:
    """The JSON answer to a GET, or to a POST without a body. Raises InvalidRequest or Unavailable with the server's
    message."""
    # The key is sent as UTF-8. urllib encodes headers as Latin-1, so each byte becomes one character here.
    headers = {"Authorization": f"Bearer {api_key}".encode().decode("latin-1")} if api_key else {}
    request = urllib.request.Request(url, b"" if post else None, headers, method="POST" if post else "GET")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)
    except urllib.error.HTTPError as e:
        with e:
            said = e.read().decode(errors="replace")
        try:
            said = json.loads(said)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = said[:300] or e.reason
        if e.code == 404:
            said += " (a gateway of an older release cannot trace)"
        raise (InvalidRequest if e.code == 400 else Unavailable)(f"{url} answers {e.code}: {said}") from e
    except (OSError, ValueError) as e:
        raise Unavailable(f"no gateway answers at {url}: {e}; name its address with --url") from e


def _write(out: Path, trace: Trace, summary: Summary, use: cpu.CpuUse | None, text: str) -> None:
    told = {"summary": asdict(summary), "table": text.splitlines()}
    if use is not None:
        told["cpu"] = asdict(use) | {"non_compute_share": use.non_compute_share}
    document = _finite(chrome.document(trace, told))
    (out / "trace.json").write_text(json.dumps(document, separators=(",", ":"), allow_nan=False))
    (out / "trace.svg").write_text(waterfall.draw(trace, summary))


def _finite(value: Any) -> Any:
    """Replaces NaN, which is not JSON, by null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value != value else value
