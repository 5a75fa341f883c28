"""Measures a rank's device at start, for the cost model. This takes a tenth of a second."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch

from stagemesh.processes.limits import available_memory_bytes
from stagemesh.protos.v1 import types_pb2

GEMM_SIZE = 512
STREAM_BYTES = 32 << 20


def measure(device: torch.device, ranks: int) -> types_pb2.DeviceInfo:
    """Returns a device's name, memory (bytes), matrix rate (FLOP/s, bf16) and weight streaming rate (bytes/s).

    `ranks` of one worker share a CPU's memory. A CPU's name ends with the number of threads that compute, because
    workers on devices of the same name count as equally fast.
    """
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
    else:
        name, memory = _cpu_name(), available_memory_bytes() // ranks
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=torch.bfloat16)
    gemm_s = _best_of(lambda: torch.mm(a, a), device)
    weights = torch.ones(STREAM_BYTES // 4, device=device, dtype=torch.float32)
    stream_s = _best_of(weights.sum, device)
    return types_pb2.DeviceInfo(
        kind=device.type,
        name=name,
        memory_bytes=memory,
        flops_per_s=2 * GEMM_SIZE**3 / gemm_s,
        bytes_per_s=STREAM_BYTES / stream_s,
    )


def _best_of(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as f:
        models = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} x{torch.get_num_threads()}"
