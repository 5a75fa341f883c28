"""Runs buf lint over the protos: `python tools/check_protos.py`. The rules are in buf.yaml.

The folder has another package name when installed, so buf gets a scratch tree with files at their import paths.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs buf. Returns its exit status."""
    buf = Path(sys.executable).parent / "buf"
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "stagemesh/protos/v1"
        target.mkdir(parents=True)
        for proto in (ROOT / "protos/v1").glob("*.proto"):
            shutil.copy(proto, target)
        shutil.copy(ROOT / "protos/buf.yaml", scratch)
        return subprocess.run([str(buf), "lint"], cwd=scratch, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
