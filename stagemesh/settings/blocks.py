"""Options that several services share: addresses, the coordinator to join, the transport of links, draining."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Base

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Options with a different default in each service. A service declares the field with one of these types.
GrpcPort = Annotated[int, Field(ge=0, le=65535, description="gRPC port; 0 asks the system for one.")]
HttpPort = Annotated[int, Field(ge=0, le=65535, description="HTTP port; 0 asks the system for one.")]
DrainTimeout = Annotated[
    float, Field(ge=0, description="Seconds that running requests get to finish when the service is told to stop.")
]


class TimeScale(Base):
    """The pace of a service (stagemesh/timing.py)."""

    time_scale: float = Field(1.0, gt=0, le=100)
    """Factor for all internal time-outs and pauses of the service: above 1 for slow machines."""


class Bind(Base):
    """The address that a server binds. It is a loopback address unless --insecure is given."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs --insecure: traffic is not encrypted yet."""
    insecure: bool = False
    """Allow listening beyond loopback without encryption."""

    @model_validator(mode="after")
    def _loopback_unless_insecure(self) -> Bind:
        if self.host not in LOOPBACK and not self.insecure:
            raise ValueError(
                f"host {self.host} is reachable from other machines and traffic is not encrypted; "
                "use a loopback address, or add --insecure on a network that you trust"
            )
        return self


class Listen(Bind, TimeScale):
    """The address on which a service listens, and the one by which others reach it."""

    advertise_host: str | None = None
    """Address that other services use to reach this one, if it differs from `host` (a pod's IP, a NAT)."""

    @property
    def reachable_host(self) -> str:
        """The host part of the address that other services use."""
        return self.advertise_host or self.host


class Revision(Base):
    """The revision of a model on a hub."""

    revision: str | None = None
    """Branch, tag or commit of a model on a hub, as in org/name@revision; default: main."""


class Join(Revision):
    """Options of a service that joins a coordinator's mesh."""

    coordinator: str = "127.0.0.1:50050"
    """Address of the coordinator, host:port."""
    model: str | None = None
    """Checkpoint on this machine, if it differs from the coordinator's: a directory, or an id on a hub (org/name)."""


class Links(Base):
    """Options of links between stages."""

    transport: Literal["auto", "ucx", "tcp"] = "auto"
    """Transport of links between stages; auto takes UCX if both ends have it, and else TCP."""
