"""Lets every test import the helpers that stand beside this file (`mesh`, `tiny_models`) by name, and `benchmarks`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).resolve().parents[1]))
