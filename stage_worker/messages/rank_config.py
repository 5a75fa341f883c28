"""The configuration that a rank process gets from its agent at its start, and the descriptors that it inherits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from stagemesh.errors import ConfigError, InternalError
from stagemesh.processes.limits import own_cores
from stagemesh.settings.base import Base
from stagemesh.settings.stage import StageSettings


class RankConfig(Base):
    """Identity of a rank, and the settings of its worker."""

    label: str
    """Role in process titles and logs, such as `stage 1`."""
    rank: int
    device: Literal["cpu", "cuda"]
    settings: StageSettings
    cpus: tuple[int, ...] = ()
    """Cores to run on; empty for any."""
    idle_cpus: tuple[int, ...] = ()
    """Cores of other ranks. Steps use them while nothing else computes there."""

    @staticmethod
    def of_worker(label: str, settings: StageSettings, device: Literal["cpu", "cuda"]) -> list[RankConfig]:
        """Makes the configs of all ranks of a worker. Raises ConfigError for an invalid list of cores."""
        return [
            RankConfig(
                label=label,
                rank=rank,
                device=device,
                settings=settings,
                cpus=_cpus(settings.cpu_list, rank),
                idle_cpus=_cpus(settings.idle_cpu_list, rank),
            )
            for rank in range(settings.tensor_parallel_size)
        ]

    @property
    def size(self) -> int:
        """Number of ranks of the worker."""
        return self.settings.tensor_parallel_size

    @property
    def title(self) -> str:
        """Name of the rank in ps and logs."""
        return f"{self.label} rank {self.rank}"

    @property
    def compute_threads(self) -> int:
        """Number of compute threads: the setting, or else one for each core of this rank."""
        return self.settings.threads or len(self.cpus) or max(1, own_cores().count // self.size)

    def pack(self) -> bytes:
        """Serializes the config for `unpack` in the rank."""
        return self.model_dump_json().encode()

    @staticmethod
    def unpack(data: bytes) -> RankConfig:
        """Parses the bytes of `pack`. Raises InternalError for other bytes."""
        try:
            config = RankConfig.model_validate_json(data)
        except ValidationError as e:
            raise InternalError(f"what a rank was started with cannot be read: {e}") from e
        if config.rank >= config.size:
            raise InternalError(f"rank {config.rank} was started of a group of {config.size}")
        return config


@dataclass(frozen=True)
class RankDescriptors:
    """File descriptors that a rank inherits. Their numbers in the agent and in the rank differ."""

    control: int
    """Socket to the agent."""
    heartbeats: int
    """Shared memory of heartbeats (heartbeat.py)."""
    exchange: int
    """Shared memory for sums over the ranks of a group on a CPU (native/exchange.py)."""
    store: int
    """File through which the ranks of a group find each other (torch.distributed.FileStore)."""
    orders: tuple[int, ...] = ()
    """Sockets for orders: on rank 0 one to each other rank, on the others one to rank 0."""

    @property
    def in_order(self) -> list[int]:
        """The descriptors as a list, for `of` in the rank."""
        return [self.control, self.heartbeats, self.exchange, self.store, *self.orders]

    @staticmethod
    def of(config: RankConfig, fds: list[int]) -> RankDescriptors:
        """Makes the descriptors from a list of `in_order`. Raises InternalError for a wrong number of descriptors."""
        expected = 4 + (config.size - 1 if config.rank == 0 else 1)
        if len(fds) != expected:
            raise InternalError(
                f"{len(fds)} descriptors came for rank {config.rank} of {config.size}, {expected} are expected"
            )
        control, heartbeats, exchange, store, *orders = fds
        return RankDescriptors(control, heartbeats, exchange, store, tuple(orders))


def _cpus(cpu_list: str | None, rank: int) -> tuple[int, ...]:
    """Parses the cores of one rank from vLLM's notation: `0-3|4-7` pins rank 0 to 0..3 and rank 1 to 4..7."""
    if not cpu_list:
        return ()
    groups = cpu_list.split("|")
    cpus: list[int] = []
    try:
        for part in filter(None, groups[rank % len(groups)].split(",")):
            low, _, high = part.partition("-")
            cpus.extend(range(int(low), int(high or low) + 1))
    except ValueError:
        raise ConfigError(f"cpu_list {cpu_list!r} is not of the form 0-3|4-7") from None
    return tuple(cpus)
