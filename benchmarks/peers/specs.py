"""Command lines and environment of each system, by layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.errors import BenchmarkError
from benchmarks.common.servers import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    Layout,
    ServerSpec,
    System,
    options_of,
    stagemesh_spec,
)

from .llama_cpp import LlamaCpp


@dataclass(frozen=True)
class Peers:
    """Locations of the other systems on this machine."""

    vllm_venv: Path
    llama_cpp: LlamaCpp | None = None


def can_serve(system: System, layout: Layout) -> bool:
    """Whether the system supports the layout: llama.cpp divides layers among servers, but splits no layer."""
    return system != "llama.cpp" or layout.tp == 1


def spec_for(system: System, layout: Layout, peers: Peers) -> ServerSpec:
    """Returns how `system` serves a model with this layout. Raises BenchmarkError if it cannot on this machine."""
    if system == "llama.cpp":
        return _llama_cpp(layout, peers)
    if system == "stagemesh":
        return stagemesh_spec(layout)
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if layout.ranks > 1:
        # By default vLLM gives each rank a NUMA node, and refuses more ranks than there are nodes.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(_core_groups(layout.ranks))
    command = [str(peers.vllm_venv / "bin" / "vllm"), "serve"]
    return ServerSpec(system, "vllm serve MODEL", command, options_of(layout), environment, "/health")


def _llama_cpp(layout: Layout, peers: Peers) -> ServerSpec:
    """Returns one server on all cores, or a server with an RPC server per stage, each on its share of the cores."""
    llama = peers.llama_cpp
    if llama is None or llama.gguf is None:
        raise BenchmarkError(
            "llama.cpp needs --llama-cpp DIR or LLAMA_CPP; `python -m benchmarks.peers.llama_cpp DIR` makes one"
        )
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
