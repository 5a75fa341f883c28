"""The slot that the coordinator leases to this process of a gateway: it names the gateway's lanes on every link."""

from __future__ import annotations

import secrets
from collections.abc import Callable


class SlotLease:
    """Renewed when frames that nobody waits for may be under way on the lanes of the old slot."""

    def __init__(self, gateway_id: str, on_renew: Callable[[], None]) -> None:
        """`on_renew`: a fresh slot is to be asked for."""
        self.gateway_id = gateway_id
        self.life = secrets.randbits(63) | 1
        """Of this process."""
        self.slot = 0
        """0: not known yet."""
        self.instance = secrets.randbits(63)
        """Of the slot: another one at each renewal."""
        self._on_renew = on_renew

    def renew(self) -> None:
        """Gives the slot up for a fresh one."""
        self.slot, self.instance = 0, secrets.randbits(63)
        self._on_renew()
