"""Settings of the coordinator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from .base import Base, flags, whole_numbers
from .blocks import GrpcPort, Links, Listen
from .model import ModelSettings
from .speculative import Speculation, SpeculativeConfig


class PipelineSettings(Base):
    """Options for the distribution of layers over workers."""

    pipeline_parallel_size: int = Field(1, ge=1, json_schema_extra=flags("-pp"))
    """Number of stages."""
    layer_partition: list[int] | None = None
    """Layers of each stage, such as 5,7; default: chosen by the cost model."""
    rebalance: Literal["off", "auto"] = "off"
    """auto: layers move between stages without a command if that is expected to make steps a tenth faster."""
    takeover_after: float = Field(15.0, ge=0)
    """Seconds after which the workers of the other stages take over the layers of a lost stage, if no other worker
    has."""
    steps_in_flight: int | None = Field(None, ge=1, le=64)
    """Number of batches into which decode rows are divided, and so of steps that run at once; default: the number of
    stages, or one more if the cost of a step says that it is faster. One if stages that lend each other their cores are
    measured to be faster so."""

    _ints = field_validator("layer_partition", mode="before")(whole_numbers)


class CoordinatorSettings(Listen, Links, PipelineSettings, Speculation, ModelSettings):
    """Settings of the coordinator."""

    port: GrpcPort = 50050
    gateways: int = Field(1, ge=1, le=64)
    """Number of gateways that share the KV pages; each gets an equal range."""
    state_dir: str | None = None
    """Folder of the SQLite file with the coordinator's state; default: the state is kept in memory only."""
    kubernetes_lease: str | None = None
    """Name of a Lease in this pod's namespace: the coordinator that holds it is the leader; default: the lock of
    --state-dir decides."""
    kubernetes_account: str = "/var/run/secrets/kubernetes.io/serviceaccount"
    """Folder of the service account's token, ca.crt and namespace."""
    lease_duration: float = Field(15.0, ge=1)
    """Seconds after which a Lease that is not renewed may be taken."""
    lease_identity: str | None = None
    """Holder identity written into the Lease, such as the pod's UID; default: one for this process."""

    @field_validator("speculative_config")
    @classmethod
    def _is_a_model(cls, value: SpeculativeConfig | None) -> SpeculativeConfig | None:
        if value is not None and value.method != "draft_model":
            raise ValueError(f"method {value.method} guesses in the gateway: give it to the gateway")
        return value
