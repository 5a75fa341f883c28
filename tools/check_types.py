"""Runs mypy --strict over the packages as they are installed: `python tools/check_types.py`.

The folders have other package names when installed (pyproject's package-dir), which mypy does not read. So mypy gets a
scratch tree of symlinks that looks like the installed packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ("protos", "coordinator", "stage_worker", "gateway")


def link_tree(scratch: Path) -> None:
    """Makes `scratch`/stagemesh, with every module at its import path."""
    package = scratch / "stagemesh"
    package.mkdir()
    for entry in (ROOT / "stagemesh").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in SERVICES:
        (package / name).symlink_to(ROOT / name)


def main() -> int:
    """Runs mypy. Returns its exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        link_tree(Path(scratch))
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
        env = {**os.environ, "MYPYPATH": scratch}
        return subprocess.run([*command, "-p", "stagemesh"], cwd=scratch, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
