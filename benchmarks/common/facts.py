"""Facts that a result must state: the machine, the model, the commit and the versions."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WATCHED_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "sve", "bf16")


def machine() -> dict[str, Any]:
    """Describes cores, CPU, instruction sets that decide matrix speed, and memory."""
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            cpu = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu,
        "cpu_flags": [flag for flag in WATCHED_CPU_FLAGS if flag in flags],
        "memory_gib": memory_bytes / 2**30,
        "kernel": platform.release().partition("-")[0],
    }


def model_facts(model: Path) -> dict[str, Any]:
    """Reads the model's sizes from its config, and its number of parameters from the tensors' headers."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {
        "parameters": sum(_parameters(file) for file in sorted(model.glob("*.safetensors"))),
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "mlp": config["intermediate_size"],
        "vocab": config["vocab_size"],
    }


def _parameters(file: Path) -> int:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def today() -> str:
    """Returns the date of the run."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def own_versions() -> dict[str, str]:
    """Returns the versions of this interpreter's packages, and the commit."""
    found = {"python": sys.version.split()[0]}
    for package in ("stagemesh", "torch", "transformers", "grpcio", "ucxx-cu12"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    return found | ({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})


def default_model(folder: Path, preset: str = "100m") -> Path:
    """Makes the seeded model of `preset` in `folder`. Returns its folder."""
    model = folder / "model"
    script = ROOT / "tools" / "make_model.py"
    subprocess.run([sys.executable, str(script), "--preset", preset, "--out", str(model)], check=True, timeout=300)
    return model
