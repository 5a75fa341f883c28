"""This gateway's place on the links of a mesh: the slot that the coordinator gave to this life of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable


class Seat:
    """Asked for anew when frames that nobody waits for may be under way on the lanes of the old slot."""

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self.life = secrets.randbits(63) | 1
        """Of this process."""
        self.slot = 0
        """0: not known yet."""
        self.on_renew: Callable[[], None] = lambda: None
        self._new_instance()

    def _new_instance(self) -> None:
        self.instance = secrets.randbits(63)

    def renew(self) -> None:
        """Gives the slot up, for a fresh one."""
        self._new_instance()
        self.slot = 0
        self.on_renew()
