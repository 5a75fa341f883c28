"""Times that are scaled as a whole, and relations between them that are refused where they do not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from stagemesh.errors import ConfigError
from stagemesh.gateway.timing import GatewayTiming
from stagemesh.rpc import RpcTiming
from stagemesh.timing import Timing
from stagemesh.transport.timing import TransportTiming


@dataclass(frozen=True)
class Example(Timing):
    renew_s: float = 0.15
    lease_s: float = 0.6
    tries: int = 3

    def relations(self) -> Iterator[tuple[bool, str]]:
        yield self.renew_s < self.lease_s, "renew_s < lease_s"


@pytest.mark.parametrize("made", [GatewayTiming, RpcTiming, TransportTiming])
def test_what_ships_holds_its_relations_at_any_scale(made: type[Timing]) -> None:
    for factor in (0.01, 1, 100):
        made().scaled(factor)


@pytest.mark.parametrize(
    ("make", "relation"),
    [
        (lambda: GatewayTiming(linger_s=61), "linger_s <= body_s"),
        (lambda: GatewayTiming(stream_kept_s=60), "stream_sweep_s < stream_kept_s"),
        (lambda: GatewayTiming(grpc_stop_s=2), "grpc_stop_s <= http_stop_s"),
        (lambda: RpcTiming(ping_interval_s=3), "ping_interval_s <= keepalive_s"),
        (lambda: RpcTiming(reconnect_first_s=2), "reconnect_first_s <= reconnect_most_s"),
        (lambda: TransportTiming(unready_sleep_s=0.1), "unready_sleep_s < self_probe_look_s"),
        (lambda: TransportTiming(self_probe_s=0.06), "2 self_probe_look_s <= self_probe_s"),
    ],
)
def test_times_that_contradict_each_other_are_refused(make: Callable[[], Timing], relation: str) -> None:
    with pytest.raises(ConfigError, match=relation):
        make()


def test_times_are_scaled_and_counts_are_not() -> None:
    assert Example().scaled(2) == Example(0.3, 1.2, 3)


def test_a_relation_that_does_not_hold_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="renew_s < lease_s does not hold"):
        Example(renew_s=1.0)
