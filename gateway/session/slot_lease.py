"""The slot that the coordinator leases to this gateway process. It identifies the gateway's lanes on every link."""

from __future__ import annotations

import secrets
from collections.abc import Callable


class SlotLease:
    """The slot. It is exchanged for a new one when late frames may still travel on the lanes of the old one."""

    def __init__(self, gateway_id: str, on_renew: Callable[[], None]) -> None:
        """`on_renew`: called to ask the coordinator for a new slot."""
        self.gateway_id = gateway_id
        self.life = secrets.randbits(63) | 1
        """Random number of this process."""
        self.slot = 0
        """The slot. 0: not known yet."""
        self.instance = secrets.randbits(63)
        """Random number that identifies the slot, another one at each renewal."""
        self._on_renew = on_renew

    def renew(self) -> None:
        """Gives the slot up, and asks for a new one."""
        self.slot, self.instance = 0, secrets.randbits(63)
        self._on_renew()
