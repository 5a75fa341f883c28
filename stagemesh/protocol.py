"""The protocol version that services speak to each other, and who may talk to whom."""

from __future__ import annotations

from stagemesh.errors import ConfigError

PROTOCOL = 2
"""Raised when a message changes its meaning."""
OLDEST = 2
"""The oldest that is understood. 2 brought tokens that go from the last stage to the first, draft rows, and results
that come a few together: a service that speaks 1 can do none of these."""


def check_protocol(theirs: int, who: str) -> None:
    """Raises ConfigError when `who` speaks a version that this release does not understand."""
    if not OLDEST <= theirs <= PROTOCOL:
        raise ConfigError(
            f"{who} speaks protocol {theirs}, this release speaks {PROTOCOL} and understands from {OLDEST} on: "
            "upgrade the older one"
        )
