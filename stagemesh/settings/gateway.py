"""Settings of the gateway."""

from __future__ import annotations

from pydantic import Field, field_validator

from .base import Base
from .blocks import DrainTimeout, GrpcPort, HttpPort, Join, Listen
from .speculative import Speculation, SpeculativeConfig


class RequestSettings(Base):
    """Options for accepting requests, and for their recovery."""

    api_key: str | None = None
    """Key that clients must send as `Authorization: Bearer`."""
    max_waiting: int = Field(256, ge=0)
    """Largest number of requests that wait for admission; a further one gets 429."""
    request_timeout: float = Field(600.0, gt=0)
    """Deadline of a request in seconds; a client may ask for a shorter one."""
    recovery_deadline: float = Field(60.0, ge=0)
    """Seconds that running requests wait for a lost stage to be replaced; then they end with STAGE_LOST."""
    enable_prefix_caching: bool = True
    """Keep the KV of full pages while there is memory, so that a shared prefix of prompts is computed once."""
    token_log: str | None = None
    """Folder in which streams are logged, so that a client can resume one at any gateway that shares the folder."""

    @field_validator("api_key")
    @classmethod
    def _not_empty(cls, key: str | None) -> str | None:
        """Strips blanks around a key, such as the line end of a file: an HTTP header cannot have them."""
        if key is None or key.strip():
            return key and key.strip()
        raise ValueError("is empty: give a key, or leave it out to serve everybody")


class GatewaySettings(Listen, RequestSettings, Speculation, Join):
    """Settings of the gateway."""

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
