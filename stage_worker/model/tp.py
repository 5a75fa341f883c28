"""The tensor-parallel group of one worker: torch.distributed (gloo on CPU, NCCL on CUDA), formed through a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from stagemesh.errors import ConfigError, TransportError

from .cut import even_range


class TPGroup:
    """The ranks that hold one stage together, and the few collectives that a shard needs.

    Ranks find each other through a file of the worker, so no port is needed. A process has one group.

    Every collective raises `TransportError` if a rank is lost or takes longer than `timeout_s`.
    """

    def __init__(
        self, store_path: str | Path, rank: int, size: int, device: str = "cpu", timeout_s: float = 60
    ) -> None:
        """Joins the group and waits for the other ranks.

        Raises:
            ConfigError: `rank` is not in the group.
            TransportError: not all ranks joined within `timeout_s`.
        """
        if not 0 <= rank < size:
            raise ConfigError(f"rank {rank} is not in a tensor-parallel group of {size}")
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        timeout = timedelta(seconds=timeout_s)
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(self.device)
        with self._lost(f"{size} ranks did not all meet within {timeout_s:.0f} s"):
            store = dist.FileStore(str(store_path), size)  # type: ignore[attr-defined]
            store.set_timeout(timeout)
            dist.init_process_group(
                "nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
            )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over ranks, in place."""
        tensor = tensor.contiguous()
        with self._lost():
            dist.all_reduce(tensor)
        return tensor

    def all_gather_last_dim(self, tensor: torch.Tensor, total: int) -> torch.Tensor:
        """Concatenates every rank's `even_range` of `total` along the last dimension."""
        parts = self._room(tensor, total)
        with self._lost():
            dist.all_gather(parts, self._padded(tensor, total))
        return self._join(parts, total)

    def gather_last_dim_to_first(self, tensor: torch.Tensor, total: int) -> torch.Tensor:
        """Does the same on rank 0. The other ranks get their own part back."""
        parts = self._room(tensor, total) if self.rank == 0 else None
        with self._lost():
            dist.gather(self._padded(tensor, total), parts, dst=0)
        return tensor if parts is None else self._join(parts, total)

    def barrier(self) -> None:
        """Waits for every rank."""
        with self._lost():
            dist.barrier()

    def close(self) -> None:
        """Leaves the group without waiting for the others.

        Afterwards a rank's process should end by `os._exit`, as multiprocessing's children do. If it runs C++
        destructors while a peer's connection closes, gloo's threads can abort it (SIGABRT).
        """
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _lost(self, what: str = "a rank is lost or late") -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TransportError(f"tensor-parallel rank {self.rank} of {self.size}: {what} ({error})") from error

    def _width(self, total: int) -> int:
        return -(-total // self.size)

    def _room(self, tensor: torch.Tensor, total: int) -> list[torch.Tensor]:
        return [tensor.new_empty(*tensor.shape[:-1], self._width(total)) for _ in range(self.size)]

    def _padded(self, tensor: torch.Tensor, total: int) -> torch.Tensor:
        missing = self._width(total) - tensor.shape[-1]
        return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor.contiguous()

    def _join(self, parts: list[torch.Tensor], total: int) -> torch.Tensor:
        cut = [even_range(total, self.size, rank) for rank in range(self.size)]
        return torch.cat([part[..., : stop - start] for part, (start, stop) in zip(parts, cut, strict=True)], dim=-1)
