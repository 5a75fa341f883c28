"""What is to be built: the model with its costs, the number of stages, and the bounds of the pipelines."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.protos.v1.types_pb2 import ModelRef, RunLimits

from .cost import CostModel


class CannotForm(Exception):
    """No pipeline can be formed from the workers there are. The text says why and what would help."""

    def __init__(self, reason: str, *, final: bool = True) -> None:
        """`final`: waiting will not help; settings, model or workers must change."""
        super().__init__(reason)
        self.reason = reason
        self.final = final


@dataclass(frozen=True)
class Target:
    """What settings and checkpoint together ask for."""

    cost: CostModel
    num_stages: int
    model: ModelRef
    layer_partition: tuple[int, ...] | None = None
    """Layers of each stage; None: the cost model decides."""
    transport: str = "auto"
    terms: str = ""
    """Digest of model and bounds."""
    takeover_s: float = 15.0
    """How long a lost stage waits for a worker before the other workers take its layers over."""
    rebalance: bool = False
    """Layers move by themselves when measured steps would be faster for it."""

    @property
    def limits(self) -> RunLimits:
        """Bounds that every worker of a pipeline allocates for."""
        return self.cost.limits
