"""Settings of a stage worker."""

from __future__ import annotations

import os
import sys
from typing import Literal

from pydantic import Field

from stagemesh.errors import ConfigError

from .base import Base, flags
from .blocks import DrainTimeout, GrpcPort, Join, Links, Listen

CPU_KV_SHARE = 0.25
"""Share of the free memory of a CPU that KV pages get by default."""


class ComputeSettings(Base):
    """Options for the device of ranks and its memory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that computes; auto takes CUDA if the machine has it."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Memory for KV pages of one rank; default: a quarter of the free memory on a CPU, the rest of
    --gpu-memory-utilization on CUDA."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that may be used."""
    journal_gib: float = Field(1.0, ge=0)
    """Memory of one rank for the activations that it sent, from which a lost neighbour is recovered; 0: none, so the
    stages before a lost one compute them again."""
    enforce_eager: bool = False
    """Run transformers' modules without compiled kernels and CUDA graphs."""


class StageSettings(Listen, Links, ComputeSettings, Join):
    """Settings of one stage worker."""

    port: GrpcPort = 0
    worker_id: str | None = None
    """Stable name of this worker; default: host name and process id."""
    stage: int | None = Field(None, ge=0)
    """Stage that this worker serves; default: any."""
    any_stage: bool = False
    """Allow this worker to take any other stage while another worker holds --stage."""
    tensor_parallel_size: int = Field(1, ge=1, le=64, json_schema_extra=flags("-tp"))
    """Number of ranks of this worker."""
    ucx_tls: str | None = None
    """UCX_TLS of the ranks, such as "tcp" or "rc,cuda"; default: UCX chooses."""
    net_device: str | None = None
    """Network device of UCX (UCX_NET_DEVICES), such as "eth0" or "mlx5_0:1"."""
    threads: int | None = Field(None, ge=1)
    """Compute threads of one rank on a CPU; default: one for each core of --cpu-list, or the rank's share of the cores
    that the worker may use (of its CPU limit in a container)."""
    cpu_list: str | None = None
    """Cores to which the ranks are pinned, one group per rank, such as "0|1"; default: not pinned."""
    idle_cpu_list: str | None = None
    """Cores of other workers on this machine, one group per rank, such as "1|0"; a step uses them, too, while nothing
    else computes, for example when only one stream decodes; default: none."""
    drain_timeout: DrainTimeout = 30.0


def device_kind(wanted: str) -> Literal["cpu", "cuda"]:
    """Returns `cpu` or `cuda` for --device. It looks for the CUDA driver's device node: to import torch takes seconds.

    Raises:
        ConfigError: CUDA is wanted, and this machine has none.
    """
    there = sys.platform == "linux" and os.path.exists("/dev/nvidiactl")
    if wanted == "cuda" and not there:
        raise ConfigError("--device cuda: this machine has no CUDA device; use --device cpu or auto")
    return "cuda" if wanted != "cpu" and there else "cpu"
