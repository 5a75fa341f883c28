"""Servers under test: how each is started, when it is ready, and how nothing of it is left behind.

A server is a process group on 127.0.0.1 with a port asked from the OS and a log file of its own. "Started" means the
same for every system: from the start of its process to the first token of a completion, because a health page says
different things on different servers.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from vllm_venv import BenchmarkError

System = Literal["stagemesh", "vllm"]

START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 20.0
POLL_S = 0.1
LOG_TAIL_LINES = 60
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 32
PR_SET_CHILD_SUBREAPER = 36
VLLM_SHARED_MEMORY = "vllm_dist_*"
"""Segments that vLLM's ranks leave in /dev/shm when the server ends."""


@dataclass(frozen=True)
class Layout:
    """How the model is split: `pp` stages of `tp` ranks each."""

    pp: int
    tp: int

    @property
    def ranks(self) -> int:
        """Processes that compute."""
        return self.pp * self.tp


@dataclass(frozen=True)
class ServerSpec:
    """What to start: `command` without model and port, and `environment` on top of the caller's."""

    system: System
    command: list[str]
    options: list[str]
    environment: dict[str, str]
    health_path: str

    def arguments(self, model: Path, port: int) -> list[str]:
        """The whole command line."""
        return [*self.command, str(model), *self.options, "--port", str(port)]

    def shown(self) -> str:
        """The command line for a reader: names instead of this machine's paths."""
        variables = " ".join(f"{name}='{value}'" for name, value in self.environment.items())
        return f"{variables} {self.system} serve MODEL {' '.join(self.options)} --port PORT".strip()


@dataclass
class RunningServer:
    """A server that has answered one completion."""

    base_url: str
    model_name: str
    start_s: float
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)


def spec_for(system: System, layout: Layout, vllm_venv: Path) -> ServerSpec:
    """How `system` serves a model split by `layout`. Raises BenchmarkError when it cannot on this machine."""
    options = ["-pp", str(layout.pp), "-tp", str(layout.tp), "--host=127.0.0.1", "--dtype=bfloat16"]
    options += [f"--max-model-len={MAX_MODEL_LEN}", f"--max-num-seqs={MAX_NUM_SEQS}"]
    if system == "stagemesh":
        command = [sys.executable, "-m", "stagemesh.cli.main", "serve"]
        return ServerSpec(system, command, options, {}, "/readyz")
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if layout.ranks > 1:
        # Left to itself, vLLM gives each rank a NUMA node, and refuses more ranks than there are nodes.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(_core_groups(layout.ranks))
    return ServerSpec(system, [str(vllm_venv / "bin" / "vllm"), "serve"], options, environment, "/health")


def _core_groups(ranks: int) -> list[str]:
    cores = sorted(os.sched_getaffinity(0))
    if ranks > len(cores):
        raise BenchmarkError(f"{ranks} ranks need {ranks} cores, this machine gives {len(cores)}")
    each = len(cores) // ranks
    return [",".join(str(core) for core in cores[rank * each : (rank + 1) * each]) for rank in range(ranks)]


@contextlib.contextmanager
def running(spec: ServerSpec, model: Path, logs: Path) -> Iterator[RunningServer]:
    """Start `spec` on `model`; yield it after its first token; end every process of it on the way out.

    Raises BenchmarkError, with the end of the server's log, when it dies or is not ready in time.
    """
    port = _free_port()
    log = logs / f"{spec.system}-{port}.log"
    environment = {**os.environ, **spec.environment}
    segments_before = _vllm_segments()
    started = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            spec.arguments(model, port),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            model_name = _first_token(spec, port, process, started + START_DEADLINE_S)
            start_s = time.monotonic() - started
            yield RunningServer(f"http://127.0.0.1:{port}", model_name, start_s, log, process)
        except BaseException:
            print(f"--- the end of {spec.system}'s log\n{tail(log)}", file=sys.stderr)
            raise
        finally:
            end(process)
            if spec.system == "vllm":
                for segment in _vllm_segments() - segments_before:
                    segment.unlink(missing_ok=True)


def _first_token(spec: ServerSpec, port: int, process: subprocess.Popen[bytes], deadline: float) -> str:
    """Wait until the server is healthy, then have it generate one token. Returns the name it serves the model by."""
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
    """The body of a 200, None for anything else or no answer."""
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
    """Make processes that a server leaves behind children of this one, so that `end` finds them in any session."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise BenchmarkError(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, SIGKILL to what is left of it after the deadline. Returns when nothing is left.

    Says so when something had to be killed: a server should end its own processes.
    """
    family = _family(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_DEADLINE_S)
    # What the server left behind was adopted by this process; what it started late shows up only now.
    family |= {child for child in psutil.Process().children(recursive=True) if child.pid != process.pid}
    left = [member for member in family if member.is_running()]
    if left:
        print(f"killed, as SIGTERM to {process.pid} had not ended them: {_names(left)}", file=sys.stderr)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, timeout=STOP_DEADLINE_S)
    process.wait(timeout=STOP_DEADLINE_S)


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
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])


def _free_port() -> int:
    """A port that the OS says is free now. The server binds it itself, so another process could take it first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
