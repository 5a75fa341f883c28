"""What an agent tells a rank process at its start."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from stagemesh.settings.stage import StageSettings


@dataclass(frozen=True)
class RankConfig:
    """One rank's identity, descriptors and resources; travels as JSON."""

    label: str
    """Role in titles and logs, such as `stage 1`."""
    rank: int
    size: int
    parent_pid: int
    control_fd: int
    """Socket to the agent."""
    order_fds: list[int]
    """Rank 0: a socket to each other rank; others: one to rank 0."""
    heart_fd: int
    """Memory in which the ranks tell their agent that they go on (heartbeat.py)."""
    device: Literal["cpu", "cuda"]
    threads: int | None
    cpus: list[int] = field(default_factory=list)
    """Cores to run on; empty: any."""
    idle_cpus: list[int] = field(default_factory=list)
    """Cores of others, to be used by steps beside which nothing else computes."""
    transport: Literal["auto", "ucx", "tcp"] = "auto"
    host: str = "127.0.0.1"
    advertise_host: str | None = None
    ucx_tls: str | None = None
    net_device: str | None = None
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float = 0.9
    journal_gib: float = 1.0
    exchange_fd: int | None = None
    """Memory that the ranks of a group share (native/exchange.py)."""
    store_fd: int | None = None
    """File over which the ranks of a group find each other (torch.distributed.FileStore)."""
    enforce_eager: bool = False
    """No compiled kernels."""
    model: str | None = None
    """Folder of the checkpoint, where the worker was given one: what to import is known before an assignment."""

    @staticmethod
    def of_worker(label: str, settings: StageSettings, device: str) -> RankConfig:
        """What is the same for all ranks of a worker, as rank 0, without descriptors."""
        s = settings
        return RankConfig(
            label=label,
            rank=0,
            size=s.tensor_parallel_size,
            parent_pid=os.getpid(),
            control_fd=-1,
            order_fds=[],
            heart_fd=-1,
            device="cuda" if device == "cuda" else "cpu",
            threads=s.threads,
            transport=s.transport,
            host=s.host,
            advertise_host=s.advertise_host,
            ucx_tls=s.ucx_tls,
            net_device=s.net_device,
            kv_cache_gib=s.kv_cache_gib,
            gpu_memory_utilization=s.gpu_memory_utilization,
            journal_gib=s.journal_gib,
            enforce_eager=s.enforce_eager,
            model=s.model,
        )

    @property
    def compute_threads(self) -> int:
        """Threads that compute: as many as were asked for, else one for each core that this rank may use."""
        return self.threads or len(self.cpus) or len(os.sched_getaffinity(0))

    @property
    def fds(self) -> list[int]:
        """The descriptors that it is to inherit."""
        return [
            self.control_fd,
            self.heart_fd,
            *self.order_fds,
            *(fd for fd in (self.exchange_fd, self.store_fd) if fd is not None),
        ]

    def inherit(self, fds: list[int]) -> RankConfig:
        """The same with other numbers for `fds`, in their order."""
        control, heart, *order = fds
        store = order.pop() if self.store_fd is not None else None
        exchange = order.pop() if self.exchange_fd is not None else None
        return replace(self, control_fd=control, heart_fd=heart, order_fds=order, exchange_fd=exchange, store_fd=store)

    def to_json(self) -> str:
        """For a command line, or a zygote's socket."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RankConfig:
        """What `to_json` made."""
        return RankConfig(**json.loads(text))
