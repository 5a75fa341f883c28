"""The version of the protocol between services.

A release speaks its own version and the one before, so that a mesh can be upgraded one process at a time.
"""

from __future__ import annotations

from stagemesh.errors import ConfigError

PROTOCOL = 3
"""This release's version. It rises when a message changes its meaning, or when a service needs something new from
others."""
OLDEST = 2
"""The oldest version that this release understands. Version 2 added tokens sent from the last stage to the first, draft
rows, and batched results."""
MOVES = 3
"""Since this version workers hold two epochs of a pipeline at once and copy pages, and gateways switch between them."""


def spoken(theirs: int) -> int:
    """Returns the version to use with a service of version `theirs`. 0 means that it sent none: releases before 3 do
    not send it."""
    return min(PROTOCOL, theirs or OLDEST)


def check_protocol(theirs: int, who: str) -> None:
    """Raises ConfigError if the service `who` uses a version that this release does not understand."""
    if not OLDEST <= theirs <= PROTOCOL:
        raise ConfigError(
            f"{who} speaks protocol {theirs}, this release speaks {PROTOCOL} and understands from {OLDEST} on: "
            "upgrade the older one"
        )
