"""The protocol version that services speak to each other, and who may talk to whom."""

from __future__ import annotations

from stagemesh.errors import ConfigError

PROTOCOL = 1
"""Raised when a message changes its meaning. Services of one version less are still understood."""


def check_protocol(theirs: int, who: str) -> None:
    """Raises ConfigError when `who` speaks a version that this release does not understand."""
    if not PROTOCOL - 1 <= theirs <= PROTOCOL:
        raise ConfigError(
            f"{who} speaks protocol {theirs}, this release speaks {PROTOCOL} and understands {PROTOCOL - 1}: "
            "upgrade the older one"
        )
