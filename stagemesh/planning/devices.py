"""Kinds of workers for `stagemesh plan`: a table of accelerators, and the words that name them. Pure.

The figures are the vendors': memory as the driver shows it, streaming rate of that memory, and dense products in
bfloat16 (without structured sparsity). A real rank reaches less of both rates.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from stagemesh.errors import ConfigError

EXAMPLE = "2xh100-80g,1xcpu-256g"


@dataclass(frozen=True)
class Device:
    """What one rank computes with."""

    name: str
    memory_gib: float
    gbytes_per_s: float
    """Streaming rate of its memory, in 10^9 bytes per second."""
    tflops_per_s: float
    """Dense products in bfloat16, in 10^12 floating-point operations per second."""

    @property
    def bytes_per_s(self) -> float:
        """Streaming rate in bytes per second."""
        return self.gbytes_per_s * 1e9

    @property
    def flops_per_s(self) -> float:
        """Products in floating-point operations per second."""
        return self.tflops_per_s * 1e12

    @property
    def is_cpu(self) -> bool:
        """Whether the rank computes on a CPU, where it takes another share of memory for KV pages."""
        return self.name == "cpu"


_TABLE = (
    Device("a10", 22, 600, 125),
    Device("a100", 80, 2039, 312),
    Device("b200", 179, 8000, 2250),
    Device("cpu", 256, 307, 100),
    Device("h100", 80, 3350, 989),
    Device("h200", 140, 4800, 989),
    Device("l4", 22, 300, 121),
    Device("l40s", 45, 864, 362),
    Device("mi300x", 192, 5300, 1307),
    Device("mi325x", 256, 6000, 1307),
    Device("rtx4090", 24, 1008, 165),
    Device("rtx5090", 32, 1792, 209),
)
"""A `cpu` is one socket of a server with eight channels of DDR5-4800 and AMX."""
DEVICES = {device.name: device for device in _TABLE}
_WORD = re.compile(r"(?:(\d+)x)?([a-z]\w*)(?:-(\d+(?:\.\d+)?)g)?")
_FIGURES = ("mem", "gbps", "tflops")


def workers(text: str) -> list[Device]:
    """Parses `COUNTxKIND[-MEMORYg]` words with commas between them, one worker a stage, in stage order.

    `gbps=`, `tflops=` and `mem=` (GiB) behind a word change the figures of its kind.

    Raises:
        ConfigError: a word is wrong. The error names it, and the nearest kind.
    """
    found: list[Device] = []
    before = 0
    for word in (part.strip().lower() for part in text.split(",")):
        if "=" in word and found:
            found[before:] = [_changed(device, word) for device in found[before:]]
            continue
        match = _WORD.fullmatch(word)
        if match is None or (match[1] and not int(match[1])):
            raise ConfigError(f"--workers: {word!r} is not COUNTxKIND[-MEMORYg]: write {EXAMPLE}")
        count, kind, memory = match.groups()
        if kind not in DEVICES:
            near = difflib.get_close_matches(kind, DEVICES, 1, cutoff=0.0)[0]
            raise ConfigError(
                f"--workers: {word!r} names no known kind; the nearest is {near}, and there are {', '.join(DEVICES)}. "
                f"Others: {near} with its own figures, such as 1x{near},mem=48,gbps=900,tflops=180"
            )
        before = len(found)
        device = DEVICES[kind]
        found += [replace(device, memory_gib=float(memory)) if memory else device] * int(count or 1)
    return found


def _changed(device: Device, word: str) -> Device:
    key, _, value = word.partition("=")
    try:
        figure = float(value)
    except ValueError:
        figure = 0.0
    if key not in _FIGURES or not 0 < figure < 1e9:
        raise ConfigError(f"--workers: {word!r} is not {', '.join(f'{name}=NUMBER' for name in _FIGURES)}")
    if key == "mem":
        return replace(device, memory_gib=figure)
    return replace(device, gbytes_per_s=figure) if key == "gbps" else replace(device, tflops_per_s=figure)
