"""Measures the linears of a 1 B Llama over weights of few bits beside bf16 ones, and bf16 prompts beside oneDNN.

    python -m benchmarks.kernels.linears [--rounds 10]

One thread, one linear at a time. The weights of each shape exist often enough to be far larger than the caches, and
are used in turn, as in a model. Times are the thread's processor time, so other work on its core does not count. All
kinds are measured in turn, and the best round counts, as work on other cores only makes a round slower.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.results import RESULTS, origin, save
from stagemesh.stage_worker.kv.memory import zeros
from stagemesh.stage_worker.native import ops, structures
from stagemesh.stage_worker.native.quantized import pack_quantized, quantized_linear, quantized_panels

SHAPES = {"q": (2048, 2048), "k, v": (512, 2048), "gate, up": (8192, 2048), "down": (2048, 8192)}
"""Name -> outputs and inputs."""
LAYER = {"q": 2, "k, v": 2, "gate, up": 2, "down": 1}
"""How many linears of each shape a layer has. That of the attention's output has the shape of q."""
ROWS = 1, 4, 8, 16, 512
BEYOND_CACHES_BYTES = 220 << 20


@dataclass(frozen=True)
class Weight:
    """A weight as readers of checkpoints hand it over. The content does not matter here."""

    kind: str
    codes: Tensor
    scales: Tensor
    group: int
    zeros: Tensor | None = None
    row_scale: Tensor | None = None
    order: None = None


def _weight(
    kind: str, group: int, scales: torch.dtype, n: int, k: int, *, offsets: bool = False, row_scale: bool = False
) -> Weight:
    group = group or k
    codes = torch.randint(0, 127, (n, k if kind in ("int8", "fp8") else k // 2), dtype=torch.uint8)
    factors = torch.rand(n, k // group).to(scales)
    return Weight(kind, codes, factors, group, factors if offsets else None, torch.rand(n) if row_scale else None)


WEIGHTS: dict[str, Callable[[int, int], Weight] | None] = {
    "bf16": None,
    "int8, a scale a row": lambda n, k: _weight("int8", 0, torch.float32, n, k),
    "int8, groups of 128": lambda n, k: _weight("int8", 128, torch.float16, n, k),
    "fp8, a scale a row": lambda n, k: _weight("fp8", 0, torch.float32, n, k),
    "fp8, blocks of 128 x 128": lambda n, k: _weight("fp8", 128, torch.float32, n, k),
    "int4, groups of 128, zeros": lambda n, k: _weight("int4", 128, torch.float16, n, k, offsets=True),
    "int4, groups of 32": lambda n, k: _weight("int4", 32, torch.float16, n, k),
    "MXFP4 (groups of 32)": lambda n, k: _weight("fp4", 32, torch.bfloat16, n, k),
    "NVFP4 (groups of 16)": lambda n, k: _weight("fp4", 16, torch.float16, n, k, row_scale=True),
    "NF4, groups of 64": lambda n, k: _weight("nf4", 64, torch.float32, n, k),
}


class Linears:
    """Copies of one linear, and the engine that runs them."""

    def __init__(self, weight: Weight | None, n: int, k: int) -> None:
        self._k = k
        if weight is None:
            packed = ops.panels(n, k, torch.bfloat16)
            ops.pack(torch.randn(n, k).bfloat16(), packed)
            first = structures.Linear(n=n, k=k)
        else:
            first = quantized_linear(weight, n)
            packed = quantized_panels(first)
            pack_quantized(first, weight, 0, packed)
        self.bytes = packed.nbytes
        copies = -(-BEYOND_CACHES_BYTES // packed.nbytes)
        self._weights = zeros((copies, packed.nbytes), torch.uint8)
        self._weights[:] = packed.view(torch.uint8).flatten()
        self._operations = (structures.Operation * copies)()
        for i, operation in enumerate(self._operations):
            linear = structures.Linear.from_buffer_copy(first)
            linear.weights = self._weights.data_ptr() + i * packed.nbytes
            operation.kind, operation.linear, operation.factor = structures.KINDS["Multiply"], linear, 1.0
            operation.source, operation.to = structures.Place(0, 0, k), structures.Place(1, 0, n)
        self._widths = array("i", [k, n])
        self._engine = ops.StageEngine(
            structures.Shape(
                dtype=1,
                hidden=k,
                page_size=16,
                widths=self._widths.buffer_info()[0],
                buffers=2,
                threads=1,
                tp_size=1,
            )
        )

    def time_s(self, rows: int) -> float:
        """Returns the seconds of one linear over so many rows."""
        hidden = torch.randn(rows, self._k).bfloat16()
        arrays = tuple(array("i", values) for values in ([0], [rows], [0], range(rows // 16 + 1)))
        step = ops.Step(1, rows, *[a.buffer_info()[0] for a in arrays], 0)
        self._engine.begin(step)
        count = len(self._operations) if rows < 64 else 1  # A prompt is not bound by memory.
        operations = (structures.Operation * count).from_buffer(self._operations)
        self._engine.run((structures.Operation * 1).from_buffer(self._operations), hidden.data_ptr())
        began = time.thread_time()
        self._engine.run(operations, hidden.data_ptr())
        return (time.thread_time() - began) / count


def measure(rounds: int) -> dict[str, Any]:
    """Measures seconds by shape, weight and rows, and the bytes of each weight."""
    found: dict[str, Any] = {}
    for shape, (n, k) in SHAPES.items():
        made = {name: Linears(None if make is None else make(n, k), n, k) for name, make in WEIGHTS.items()}
        best = {name: dict.fromkeys(ROWS, float("inf")) for name in made}
        for _ in range(rounds):
            for rows in ROWS:
                for name, linears in made.items():
                    best[name][rows] = min(best[name][rows], linears.time_s(rows))
        found[shape] = {name: {"bytes": made[name].bytes, "seconds": best[name]} for name in made}
    return found


def measure_onednn(rounds: int, rows: int) -> dict[str, float]:
    """Returns the seconds of the fastest bf16 product of oneDNN, by shape."""
    found = {}
    for shape, (n, k) in SHAPES.items():
        x, w = torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16()
        columns, packed = w.t().contiguous(), torch.ops.mkldnn._reorder_linear_weight(w, rows)
        ways: list[Callable[[], Tensor]] = [
            lambda x=x, columns=columns: torch.mm(x, columns),
            lambda x=x, w=w: torch.nn.functional.linear(x, w),
            lambda x=x, packed=packed: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        ]
        best = float("inf")
        for _ in range(rounds):
            for way in ways:
                began = time.thread_time()
                way()
                best = min(best, time.thread_time() - began)
        found[shape] = best
    return found


def _layer(found: dict[str, Any], weight: str, rows: int) -> tuple[float, int]:
    """Returns seconds and bytes of all linears of a layer."""
    own = [(found[shape][weight], count) for shape, count in LAYER.items()]
    return sum(count * w["seconds"][rows] for w, count in own), sum(count * w["bytes"] for w, count in own)


def report(result: dict[str, Any]) -> list[str]:
    """Returns the tables in Markdown."""
    found, onednn, prompt = result["linears"], result["onednn_prompt_s"], ROWS[-1]
    weights = sum(n * k * LAYER[shape] for shape, (n, k) in SHAPES.items())
    head = [f"{rows} row{'s' * (rows > 1)}" for rows in ROWS]
    lines = [
        "# Linears over quantized weights",
        "",
        f"`{result['command']}`, {result['date']}, one core of {result['machine']['cpu']}: the seven linears "
        f"of a layer of a 1 B Llama ({weights / 1e6:.1f} M weights), beyond all caches. Microseconds, the ratio to "
        "bf16, and for one row the rate at which weights are read.",
        "",
        f"| weights | bits | {' | '.join(head)} | GB/s, 1 row | G weights/s, 1 row | GFLOP/s, {prompt} rows |",
        "| --- " * (len(head) + 5) + "|",
    ]
    for weight in WEIGHTS:
        cells = []
        for rows in ROWS:
            seconds, _ = _layer(found, weight, rows)
            cells.append(f"{seconds * 1e6:.0f} ({seconds / _layer(found, 'bf16', rows)[0]:.2f})")
        one, stored = _layer(found, weight, 1)
        rates = f"{stored / one / 1e9:.0f} | {weights / one / 1e9:.0f}"
        flops = 2 * weights * prompt / _layer(found, weight, prompt)[0] / 1e9
        lines.append(f"| {weight} | {8 * stored / weights:.2f} | {' | '.join(cells)} | {rates} | {flops:.0f} |")
    lines += [
        "",
        "One row by shape, microseconds (ratio to bf16):",
        "",
        f"| weights | {' | '.join(f'{shape} {n} x {k}' for shape, (n, k) in SHAPES.items())} |",
        "| --- " * (len(SHAPES) + 1) + "|",
    ]
    for weight in WEIGHTS:
        times = [(found[s][weight]["seconds"][1], found[s]["bf16"]["seconds"][1]) for s in SHAPES]
        lines.append(f"| {weight} | {' | '.join(f'{1e6 * own:.0f} ({own / plain:.2f})' for own, plain in times)} |")
    lines += [
        "",
        f"A prompt of {prompt} in bf16 beside the fastest of oneDNN's products (`torch.mm`, `linear`, packed weights), "
        "GFLOP/s:",
        "",
        "| shape | ours | oneDNN | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for shape, (n, k) in SHAPES.items():
        ours, best = (2 * n * k * prompt / s / 1e9 for s in (found[shape]["bf16"]["seconds"][prompt], onednn[shape]))
        lines.append(f"| {shape} | {ours:.0f} | {best:.0f} | {ours / best:.2f} |")
    return lines


def main() -> int:
    """Measures and writes `results/linears.*`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        **origin(f"kernels.linears --rounds {given.rounds}"),
        "linears": measure(given.rounds),
        "onednn_prompt_s": measure_onednn(given.rounds, ROWS[-1]),
    }
    save(RESULTS / "linears", result, report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
