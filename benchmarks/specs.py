"""What each system is started as for a layout: command lines and environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama_cpp import LlamaCpp
from vllm_venv import BenchmarkError

System = Literal["stagemesh", "vllm", "llama.cpp"]

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 32


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
class Peers:
    """Where the other systems are on this machine."""

    vllm_venv: Path
    llama_cpp: LlamaCpp | None = None


@dataclass(frozen=True)
class ServerSpec:
    """What to start: `command` without model and port, and `environment` on top of the caller's."""

    system: System
    shown_command: str
    """What a reader types instead of `command`."""
    command: list[str]
    options: list[str]
    environment: dict[str, str]
    health_path: str
    model: Path | None = None
    """A file of its own, where the system does not read the checkpoint's folder."""
    helpers: list[list[str]] = field(default_factory=list)
    """Processes that must listen before it starts, each to be given `--port`."""
    helpers_option: str = ""
    """Option that names the helpers' addresses."""

    def arguments(self, model: Path, port: int, helper_ports: Sequence[int]) -> list[str]:
        """The whole command line."""
        named = [self.helpers_option, ",".join(f"127.0.0.1:{p}" for p in helper_ports)] if helper_ports else []
        return [*self.command, str(self.model or model), *self.options, *named, "--port", str(port)]

    def shown(self) -> str:
        """The command lines for a reader: names instead of this machine's paths and ports."""
        variables = " ".join(f"{name}='{value}'" for name, value in self.environment.items())
        helpers = [" ".join([*_bare(helper), "--port", f"PORT{i}"]) + " &" for i, helper in enumerate(self.helpers)]
        named = [self.helpers_option, ",".join(f"127.0.0.1:PORT{i}" for i in range(len(self.helpers)))]
        options = [*self.options, *(named if self.helpers else [])]
        server = f"{variables} {self.shown_command} {' '.join(options)} --port PORT".strip()
        return "\n".join([*helpers, server])


def _bare(command: list[str]) -> list[str]:
    return [word.rpartition("/")[2] if word.startswith("/") else word for word in command]


def can_serve(system: System, layout: Layout) -> bool:
    """Whether the system has such a layout: llama.cpp splits layers over servers, and no layer over several."""
    return system != "llama.cpp" or layout.tp == 1


def spec_for(system: System, layout: Layout, peers: Peers) -> ServerSpec:
    """How `system` serves a model split by `layout`. Raises BenchmarkError when it cannot on this machine."""
    if system == "llama.cpp":
        return _llama_cpp(layout, peers)
    options = ["-pp", str(layout.pp), "-tp", str(layout.tp), "--host=127.0.0.1", "--dtype=bfloat16"]
    options += [f"--max-model-len={MAX_MODEL_LEN}", f"--max-num-seqs={MAX_NUM_SEQS}"]
    shown = f"{system} serve MODEL"
    if system == "stagemesh":
        command = [sys.executable, "-m", "stagemesh.cli.main", "serve"]
        return ServerSpec(system, shown, command, options, {}, "/readyz")
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if layout.ranks > 1:
        # Left to itself, vLLM gives each rank a NUMA node, and refuses more ranks than there are nodes.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(_core_groups(layout.ranks))
    command = [str(peers.vllm_venv / "bin" / "vllm"), "serve"]
    return ServerSpec(system, shown, command, options, environment, "/health")


def _llama_cpp(layout: Layout, peers: Peers) -> ServerSpec:
    """One server on all cores, or a server and as many RPC servers as stages, each on its share of the cores."""
    llama = peers.llama_cpp
    if llama is None or llama.gguf is None:
        raise BenchmarkError("llama.cpp needs --llama-cpp DIR or LLAMA_CPP; benchmarks/llama_cpp.py DIR makes one")
    cores = len(os.sched_getaffinity(0))
    options = ["--alias", "model", "--host", "127.0.0.1", "--parallel", str(MAX_NUM_SEQS), "--no-webui"]
    options += ["--ctx-size", str(MAX_NUM_SEQS * MAX_MODEL_LEN)]
    helpers: list[list[str]] = []
    if layout.pp == 1:
        options += ["--threads", str(cores)]
    else:
        options += ["--threads", "1", "--gpu-layers", "99", "--tensor-split", ",".join(["1"] * layout.pp)]
        each = max(1, cores // layout.pp)
        for group in _core_groups(layout.pp):
            rpc = [str(llama.rpc_server), "--host", "127.0.0.1", "--threads", str(each)]
            helpers.append(["taskset", "-c", group, *rpc])
    command = [str(llama.server), "-m"]
    shown = "llama-server -m MODEL.gguf"
    return ServerSpec(
        "llama.cpp", shown, command, options, {}, "/health", model=llama.gguf, helpers=helpers, helpers_option="--rpc"
    )


def _core_groups(ranks: int) -> list[str]:
    cores = sorted(os.sched_getaffinity(0))
    if ranks > len(cores):
        raise BenchmarkError(f"{ranks} ranks need {ranks} cores, this machine gives {len(cores)}")
    each = len(cores) // ranks
    return [",".join(str(core) for core in cores[rank * each : (rank + 1) * each]) for rank in range(ranks)]
