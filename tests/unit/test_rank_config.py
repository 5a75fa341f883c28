"""What a rank is told at its start."""

from __future__ import annotations

import pytest

from stagemesh.stage_worker.messages.rank_config import RankConfig


@pytest.mark.parametrize("exchange", [None, 6])
@pytest.mark.parametrize("store", [None, 7])
def test_descriptors_come_to_where_they_belong(exchange: int | None, store: int | None) -> None:
    """A forked rank gets them under other numbers."""
    config = RankConfig(
        label="stage 0", rank=0, size=3, parent_pid=1, control_fd=3, order_fds=[4, 5], heart_fd=8, device="cpu",
        threads=None, exchange_fd=exchange, store_fd=store,
    )  # fmt: skip
    other = config.inherit([fd + 100 for fd in config.fds])
    assert (other.control_fd, other.order_fds, other.heart_fd) == (103, [104, 105], 108)
    assert (other.exchange_fd, other.store_fd) == (exchange and 106, store and 107)
