"""Slots 1..250 of gateway instances: a slot identifies a gateway's lanes on every link.

The slot of a gateway that is gone stays unused for a while: the old instance may still live, and its late frames must
not be mistaken for the new one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stagemesh.errors import ConfigError, QueueFull

MAX_SLOT = 250


@dataclass
class _Holder:
    gateway_id: str
    instance: int
    life: int = 0
    streams: int = 0
    gone_at: float = 0.0


class Slots:
    """Assigns slots. Pure, with the clock as an argument."""

    def __init__(
        self, stored: Mapping[int, tuple[str, int]], *, now: float, quarantine_s: float, first: int = 1
    ) -> None:
        """`stored`: slots from before a restart, which count as just gone. `quarantine_s`: how long the slot of a
        gateway that is gone is not given to another one. `first`: where the search for a free slot starts."""
        self._quarantine_s = quarantine_s
        self._holders = {slot: _Holder(name, instance, gone_at=now) for slot, (name, instance) in stored.items()}
        self._next = first

    def acquire(self, gateway_id: str, instance: int, now: float, life: int = 0) -> int:
        """The slot of this instance, the same each time it asks.

        `life`: a number of the gateway's process; 0 if it sends none. Raises ConfigError while another process of the
        same name has streams open, QueueFull when all slots are taken.
        """
        named = {slot: holder for slot, holder in self._holders.items() if holder.gateway_id == gateway_id}
        if life and any(holder.streams and holder.life not in (0, life) for holder in named.values()):
            raise ConfigError(
                f"another gateway named {gateway_id!r} is connected: give each its own --gateway-id, or wait until "
                "that one is gone"
            )
        for slot, holder in named.items():
            if holder.instance == instance:
                holder.streams, holder.life = holder.streams + 1, life
                return slot
        for offset in range(MAX_SLOT):
            slot = (self._next - 1 + offset) % MAX_SLOT + 1
            held = self._holders.get(slot)
            if held is None or (held.streams == 0 and now - held.gone_at >= self._quarantine_s):
                self._holders[slot] = _Holder(gateway_id, instance, life, streams=1)
                self._next = slot % MAX_SLOT + 1
                return slot
        raise QueueFull(
            f"all {MAX_SLOT} gateway slots are taken, or were until {self._quarantine_s:.0f} s ago: "
            "run fewer gateways, or try again later",
            retry_after_s=self._quarantine_s,
        )

    def expire(self, now: float) -> list[int]:
        """Frees slots whose gateways have been gone for `quarantine_s`. Returns them."""
        gone = [
            slot
            for slot, holder in self._holders.items()
            if holder.streams == 0 and now - holder.gone_at >= self._quarantine_s
        ]
        for slot in gone:
            del self._holders[slot]
        return gone

    def release(self, slot: int, now: float) -> None:
        """A stream of the slot's gateway ended."""
        holder = self._holders[slot]
        holder.streams -= 1
        holder.gone_at = now
