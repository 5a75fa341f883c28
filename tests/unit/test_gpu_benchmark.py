"""What the GPU benchmark holds its times against, and what it says of a case that failed. (Its times: docs/gpu.md.)"""

from __future__ import annotations

import pytest

from benchmarks import gpu

ENDLESS = 1e30


def test_bounds_are_those_of_the_shape() -> None:
    """Llama 3.1 8B: 7.5 G parameters are read in a decode step, 15 GB; 128 KiB of KV a position."""
    reads = gpu.Rates(bytes_s=1e9, flop_s=ENDLESS)
    assert gpu.bound_s("8b", reads, 1, 1, 0) == pytest.approx(15.01, rel=1e-3)
    more = gpu.bound_s("8b", reads, 64, 1, 1024) - gpu.bound_s("8b", reads, 64, 1, 0)
    assert more == pytest.approx(64 * 1024 * 131072 / 1e9)
    # 2 operations a parameter and token, and 4 a head dimension and pair of positions.
    computes = gpu.Rates(bytes_s=ENDLESS, flop_s=1e12)
    expected = (2 * 6.98e9 * 8192 + 4 * 32 * 4096 * 8192 * 8193 / 2) / 1e12
    assert gpu.bound_s("8b", computes, 1, 8192, 0) == pytest.approx(expected, rel=2e-3)


def test_a_failed_case_is_a_cell_of_the_table_and_no_number() -> None:
    result = {
        "device_name": "a device",
        "date": "2026-01-01",
        "rates": {"bytes_s": 4e12, "flop_s": 7e14},
        "context": 8,
        "prompt": 16,
        "bounds_ms": {"1b": {"decode 1": 0.5}},
        "systems": {"1b": {"one stage": {"decode 1": 1.0}, "transformers": "TimeoutExpired: 560 s"}},
    }
    assert gpu.table_of(result).splitlines()[-1] == "| 1b | decode 1 | 0.50 | 1.00 (50 %) |  |  | failed |"
