"""Settings of the gateway."""

from __future__ import annotations

from pydantic import Field, field_validator

from .base import Base
from .blocks import DrainTimeout, GrpcPort, HttpPort, Join, Listen
from .speculative import Speculation, SpeculativeConfig


class RequestSettings(Base):
    """How clients' requests are taken and kept."""

    api_key: str | None = None
    """Key that clients must send as `Authorization: Bearer`."""
    max_waiting: int = Field(256, ge=0)
    """Requests that may wait for admission; beyond it, 429."""
    request_timeout: float = Field(600.0, gt=0)
    """Longest life of a request in seconds; a client may ask for less."""
    recovery_deadline: float = Field(60.0, ge=0)
    """Seconds that running requests wait for a lost stage to be made good; then they end with STAGE_LOST."""
    enable_prefix_caching: bool = True
    """Keep the KV of full pages as long as memory lasts, so that a prompt that begins alike is not computed again."""
    token_log: str | None = None
    """Folder in which streams are written down, so that a client can resume them at any gateway that shares it."""


class GatewaySettings(Listen, RequestSettings, Speculation, Join):
    """The gateway."""

    port: HttpPort = 8000
    grpc_port: GrpcPort = 50051
    gateway_id: str = "gateway-0"
    """Stable name of this gateway."""
    max_body_mib: float = Field(8.0, gt=0)
    """Largest HTTP body."""
    drain_timeout: DrainTimeout = 30.0

    @field_validator("speculative_config")
    @classmethod
    def _is_lookup(cls, value: SpeculativeConfig | None) -> SpeculativeConfig | None:
        if value is not None and value.method != "ngram":
            raise ValueError(f"method {value.method} guesses on the last stage: give it to the coordinator")
        return value
