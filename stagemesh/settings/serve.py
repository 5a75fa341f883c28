"""Settings of `stagemesh serve`."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from .base import flags, whole_numbers
from .blocks import Bind, DrainTimeout, GrpcPort, HttpPort, Links, TimeScale
from .coordinator import PipelineSettings
from .gateway import RequestSettings
from .model import ModelSettings
from .speculative import Speculation
from .stage import ComputeSettings

MAX_STAGES = 64


class ServeSettings(
    Bind, TimeScale, Links, RequestSettings, ComputeSettings, PipelineSettings, Speculation, ModelSettings
):
    """Settings of a whole mesh on this machine. `host` is the gateway's; the other services stay on loopback."""

    port: HttpPort = 8000
    grpc_port: GrpcPort = 0
    tensor_parallel_size: list[int] = Field(default=[1], json_schema_extra=flags("-tp"))
    """Ranks of each stage: one number for all stages, or one for each, such as 2,1."""
    standby: int = Field(0, ge=0, le=16)
    """Number of extra workers that replace a lost stage."""
    # This value keeps the whole stop under 5 s.
    drain_timeout: DrainTimeout = 2.0
    start_timeout: float = Field(600.0, gt=0)
    """Seconds within which the mesh must be ready, not counting those in which files are fetched from a hub."""

    _sizes = field_validator("tensor_parallel_size", mode="before")(whole_numbers)

    @model_validator(mode="after")
    def _sizes_agree(self) -> ServeSettings:
        pp, tp = self.pipeline_parallel_size, self.tensor_parallel_size
        if pp > MAX_STAGES:
            raise ValueError(f"pipeline_parallel_size {pp}: `serve` starts at most {MAX_STAGES} stages on one machine")
        if any(size < 1 for size in tp) or len(tp) not in (1, pp):
            raise ValueError(
                f"tensor_parallel_size {tp} must be one positive number, or one for each of the {pp} stages"
            )
        return self

    @property
    def tp_sizes(self) -> list[int]:
        """Ranks of each stage."""
        tp = self.tensor_parallel_size
        return tp * self.pipeline_parallel_size if len(tp) == 1 else tp
