"""Lets the tests here use the chains of `tests/numerics`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))
