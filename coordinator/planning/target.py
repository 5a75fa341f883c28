"""The target: the model with its costs, the number of stages, and the limits of the pipelines."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.planning.cost import CostModel
from stagemesh.protos.v1.types_pb2 import ModelRef, RunLimits


class CannotForm(Exception):
    """No pipeline can be formed from the registered workers. The text says why and what would help."""

    def __init__(self, reason: str, *, final: bool = True) -> None:
        """`final`: waiting will not help; settings, model or workers must change."""
        super().__init__(reason)
        self.reason = reason
        self.final = final


@dataclass(frozen=True)
class Target:
    """What the settings and the checkpoint ask for."""

    cost: CostModel
    num_stages: int
    model: ModelRef
    layer_partition: tuple[int, ...] | None = None
    """Layers of each stage; None: the cost model decides."""
    transport: str = "auto"
    terms: str = ""
    """Digest of model and limits."""
    takeover_s: float = 15.0
    """How long a lost stage waits for a worker before the other workers take over its layers."""
    rebalance: bool = False
    """Whether layers move automatically when measured steps say that it would be faster."""
    heads: frozenset[tuple[int, int]] = frozenset()
    """Query heads and KV heads that the ranks of a worker must divide. Empty: any number of ranks will do."""

    @property
    def limits(self) -> RunLimits:
        """Limits that every worker of a pipeline allocates for."""
        return self.cost.limits
