"""Options of `stagemesh bench trace`."""

from __future__ import annotations

from pathlib import Path

from stagemesh.settings.base import Base


class TraceOptions(Base):
    """Options of a trace. The gateway checks the bounds of a request."""

    url: str | None = None
    """A running gateway's HTTP address; default: http://127.0.0.1:8000."""
    steps: int = 200
    """Steps to trace, at most 4096."""
    timeout: float = 60.0
    """Seconds to wait for the steps, at most 300."""
    load: str | None = None
    """Load to send during the trace, CxIxO: requests at once x prompt tokens x output tokens; default: none, or
    16x128x64 with MODEL."""
    seed: int = 0
    """Seed of the load's prompts."""
    api_key: str | None = None
    """The server's key; or $STAGEMESH_API_KEY."""
    out: Path
    """Folder to write to. It is created if missing."""
