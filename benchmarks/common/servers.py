"""Starts and ends servers under test, and waits until they are ready.

A server is a process group on 127.0.0.1 with a free port and its own log file. It counts as started when it has
answered the first token of a completion. Health pages would not do: their meaning differs between systems.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.common.errors import BenchmarkError

START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 20.0
POLL_S = 0.1
LOG_TAIL_LINES = 60
PR_SET_CHILD_SUBREAPER = 36
VLLM_SHARED_MEMORY = "vllm_dist_*"
"""Segments that vLLM's ranks leave in /dev/shm when the server ends."""


System = Literal["stagemesh", "vllm", "llama.cpp"]

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 32


@dataclass(frozen=True)
class Layout:
    """The split of the model: `pp` stages of `tp` ranks each."""

    pp: int
    tp: int

    @property
    def ranks(self) -> int:
        """Number of processes that compute."""
        return self.pp * self.tp


@dataclass(frozen=True)
class ServerSpec:
    """A server to start: `command` without model and port, and `environment`, which is added to the caller's."""

    system: System
    shown_command: str
    """`command` for a reader, without this machine's paths."""
    command: list[str]
    options: list[str]
    environment: dict[str, str]
    health_path: str
    model: Path | None = None
    """A separate model file, if the system does not read the checkpoint's folder."""
    helpers: list[list[str]] = field(default_factory=list)
    """Commands of processes that must listen before the server starts. Each gets `--port`."""
    helpers_option: str = ""
    """Option that names the helpers' addresses."""

    def arguments(self, model: Path, port: int, helper_ports: Sequence[int]) -> list[str]:
        """Returns the whole command line."""
        named = [self.helpers_option, ",".join(f"127.0.0.1:{p}" for p in helper_ports)] if helper_ports else []
        return [*self.command, str(self.model or model), *self.options, *named, "--port", str(port)]

    def shown(self) -> str:
        """Returns the command lines for a reader, with names instead of this machine's paths and ports."""
        variables = " ".join(f"{name}='{value}'" for name, value in self.environment.items())
        helpers = [" ".join([*_bare(helper), "--port", f"PORT{i}"]) + " &" for i, helper in enumerate(self.helpers)]
        named = [self.helpers_option, ",".join(f"127.0.0.1:PORT{i}" for i in range(len(self.helpers)))]
        options = [*self.options, *(named if self.helpers else [])]
        server = f"{variables} {self.shown_command} {' '.join(options)} --port PORT".strip()
        return "\n".join([*helpers, server])


def _bare(command: list[str]) -> list[str]:
    return [word.rpartition("/")[2] if word.startswith("/") else word for word in command]


def options_of(layout: Layout) -> list[str]:
    """Returns the options of stagemesh and vLLM, with the flags that they share."""
    options = ["-pp", str(layout.pp), "-tp", str(layout.tp), "--host=127.0.0.1", "--dtype=bfloat16"]
    return [*options, f"--max-model-len={MAX_MODEL_LEN}", f"--max-num-seqs={MAX_NUM_SEQS}"]


def stagemesh_spec(layout: Layout, *more: str) -> ServerSpec:
    """Returns `stagemesh serve` with this layout, and more options."""
    command = [sys.executable, "-m", "stagemesh.cli.main", "serve"]
    return ServerSpec("stagemesh", "stagemesh serve MODEL", command, [*options_of(layout), *more], {}, "/readyz")


@dataclass
class RunningServer:
    """A server that has answered one completion."""

    base_url: str
    model_name: str
    start_s: float
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)


@contextlib.contextmanager
def running(spec: ServerSpec, model: Path, logs: Path) -> Iterator[RunningServer]:
    """Starts `spec` on `model`, yields it after its first token, and ends all its processes after the block.

    Prints the end of the server's log on an error. Raises BenchmarkError if it dies or is not ready in time.
    """
    port = _free_port()
    log = logs / f"{spec.system}-{port}.log"
    segments_before = _vllm_segments()
    started = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    with log.open("wb") as sink:

        def start(command: list[str]) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.environment},
                start_new_session=True,
            )
            processes.insert(0, process)  # The process that was started last is ended first.
            return process

        try:
            deadline = started + START_DEADLINE_S
            helper_ports = [_free_port() for _ in spec.helpers]
            for helper, helper_port in zip(spec.helpers, helper_ports, strict=True):
                _until_listening(start([*helper, "--port", str(helper_port)]), helper[0], helper_port, deadline)
            process = start(spec.arguments(model, port, helper_ports))
            model_name = _first_token(spec, port, process, deadline)
            start_s = time.monotonic() - started
            yield RunningServer(f"http://127.0.0.1:{port}", model_name, start_s, log, process)
        except BaseException:
            print(f"--- the end of {spec.system}'s log\n{tail(log)}", file=sys.stderr)
            raise
        finally:
            end(processes)
            if spec.system == "vllm":
                for segment in _vllm_segments() - segments_before:
                    segment.unlink(missing_ok=True)


def _until_listening(process: subprocess.Popen[bytes], name: str, port: int, deadline: float) -> None:
    """Waits until a process accepts connections on `port`."""
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"{name} does not listen on port {port} (exit status {process.poll()})")
        time.sleep(POLL_S)


def _first_token(spec: ServerSpec, port: int, process: subprocess.Popen[bytes], deadline: float) -> str:
    """Waits until the server is healthy, then makes it generate one token. Returns its name of the model."""
    while _get(port, spec.health_path) is None:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{spec.system} was not ready within {START_DEADLINE_S:.0f} s")
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=POLL_S)
            raise BenchmarkError(f"{spec.system} ended with code {code} before it was ready")
    listing = _get(port, "/v1/models")
    if listing is None:
        raise BenchmarkError(f"{spec.system} is healthy but does not list its model at /v1/models")
    name: str = json.loads(listing)["data"][0]["id"]
    body = {"model": name, "prompt": "a", "max_tokens": 1, "temperature": 0}
    answer = _request(port, "POST", "/v1/completions", body, timeout_s=60.0)
    if answer is None:
        raise BenchmarkError(f"{spec.system} is healthy but does not complete a prompt")
    return name


def _get(port: int, path: str) -> bytes | None:
    return _request(port, "GET", path, None, timeout_s=5.0)


def _request(port: int, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> bytes | None:
    """Returns the body of an answer with status 200, or None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        return content if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def adopt_orphans() -> None:
    """Makes a server's orphans children of this process, so that `end` finds them in any session."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise BenchmarkError(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Sends SIGTERM to each, in order, and SIGKILL to those left after the deadline. Returns when none is left.

    Prints the processes that it had to kill: a server should end its own processes.
    """
    family = {member for process in processes for member in _family(process.pid)}
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_DEADLINE_S)
    # This process adopted a server's orphans. Processes that were started late are visible only now.
    family |= set(psutil.Process().children(recursive=True))
    left = [member for member in family if member.is_running()]
    alive = [member for member in left if not _is_zombie(member)]
    if alive:
        print(f"killed, as SIGTERM had not ended them: {_names(alive)}", file=sys.stderr)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, timeout=STOP_DEADLINE_S)
    for process in processes:
        process.wait(timeout=STOP_DEADLINE_S)


def _is_zombie(process: psutil.Process) -> bool:
    """Whether the process has ended and only its parent has not reaped it yet."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _names(processes: list[psutil.Process]) -> str:
    names: list[str] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(f"{process.pid} {process.name()}")
    return ", ".join(names)


def _family(pid: int) -> set[psutil.Process]:
    try:
        leader = psutil.Process(pid)
        return {leader, *leader.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def _vllm_segments() -> set[Path]:
    return set(Path("/dev/shm").glob(VLLM_SHARED_MEMORY))


def tail(log: Path) -> str:
    """Returns the last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _free_port() -> int:
    """Returns a port that is free now. The server binds it later, so another process could take it first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
