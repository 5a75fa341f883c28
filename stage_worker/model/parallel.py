"""A rank's place among the ranks of its worker, and their connection, made when a shard first needs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stagemesh.errors import ConfigError

if TYPE_CHECKING:
    from ..native.exchange import Exchange
    from .tp import TPGroup


@dataclass
class TensorParallel:
    """Rank `rank` of `size`, and its means to exchange data with the others.

    Shards of transformers' modules use torch.distributed (through a file at `store_path`). Shards of compiled kernels
    use shared memory (`exchange_fd`). All ranks load in the same way, so they make the same one at the same point.
    If a rank makes the others wait for `timeout_s`, it is lost, and their step raises TransportError.
    """

    rank: int = 0
    size: int = 1
    store_path: str | Path | None = None
    exchange_fd: int | None = None
    device: str = "cpu"
    timeout_s: float = 60.0
    _group: TPGroup | None = field(default=None, init=False)
    _exchange: Exchange | None = field(default=None, init=False)

    def group(self) -> TPGroup:
        """Returns the group over torch.distributed. Raises TransportError if not all ranks join."""
        if self._group is None:
            if self.store_path is None:
                raise ConfigError(f"{self.size} ranks need a file to meet through")
            from .tp import TPGroup

            self._group = TPGroup(self.store_path, self.rank, self.size, self.device, self.timeout_s)
        return self._group

    def exchange(self) -> Exchange:
        """Returns the rank's part in the shared memory."""
        if self._exchange is None:
            if self.exchange_fd is None:
                raise ConfigError(f"{self.size} ranks need shared memory to meet in")
            from ..native.exchange import Exchange

            self._exchange = Exchange(self.exchange_fd, self.rank, self.size, self.timeout_s)
        return self._exchange

    def close(self) -> None:
        """Leaves the group without waiting for the others."""
        if self._group is not None:
            self._group.close()
