"""Options of `stagemesh bench trace`."""

from __future__ import annotations

from pathlib import Path

from stagemesh.settings.base import Base


class TraceOptions(Base):
    """What is traced, and where it is written. The gateway checks the bounds of what it is asked for."""

    url: str | None = None
    """A running gateway's HTTP address; default: http://127.0.0.1:8000."""
    steps: int = 200
    """Steps to trace, at most 4096."""
    timeout: float = 60.0
    """Seconds to wait for them, at most 300."""
    load: str | None = None
    """CxIxO: requests at once x prompt tokens x output tokens to send meanwhile; default: none, or 16x128x64 with
    MODEL."""
    seed: int = 0
    """Seed of the load's prompts."""
    api_key: str | None = None
    """The server's key; or $STAGEMESH_API_KEY."""
    out: Path
    """Folder to write to; made where missing."""
