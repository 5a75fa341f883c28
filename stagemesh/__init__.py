"""stagemesh serves one large language model over a gRPC mesh of pipeline-stage workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stagemesh.client import Client as Client

__version__ = "0.3.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the client on first use, so that a process does not pay for imports that it does not need."""
    if name == "Client":
        from stagemesh.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
