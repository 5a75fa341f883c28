"""Lets the tests here use the tiny models and chains of `tests/numerics`, and the disturbed meshes of `tests/chaos`."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("numerics", "chaos"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
