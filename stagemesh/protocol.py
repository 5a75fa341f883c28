"""The protocol version that services speak to each other, and who may talk to whom.

A release speaks its own version and the one before, so that a mesh can be upgraded one process at a time.
"""

from __future__ import annotations

from stagemesh.errors import ConfigError

PROTOCOL = 3
"""Raised when a message changes its meaning, or something is asked of the other side that it did not know before."""
OLDEST = 2
"""The oldest that is understood. 2 brought tokens that go from the last stage to the first, draft rows, and results
that come a few together: a service that speaks 1 can do none of these."""
MOVES = 3
"""From here on workers hold two epochs of a pipeline at once and copy pages, and gateways go from one to the next."""


def spoken(theirs: int) -> int:
    """What to speak to a service of version `theirs`; 0 where it does not say, which none does that speaks 3."""
    return min(PROTOCOL, theirs or OLDEST)


def check_protocol(theirs: int, who: str) -> None:
    """Raises ConfigError when `who` speaks a version that this release does not understand."""
    if not OLDEST <= theirs <= PROTOCOL:
        raise ConfigError(
            f"{who} speaks protocol {theirs}, this release speaks {PROTOCOL} and understands from {OLDEST} on: "
            "upgrade the older one"
        )
