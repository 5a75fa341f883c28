"""A forecast for people: lines of at most 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from .forecast import Forecast
from .partition import GIB

HEAD = ("stage", "worker", "layers", "weights", "KV/token", "KV tokens", "1 row")
WIDTHS = (5, 18, 7, 10, 10, 10, 10, 10)


def lines(plan: Forecast) -> Iterator[str]:
    """Yields the lines."""
    weights = sum(stage.weight_bytes * stage.tensor_parallel_size for stage in plan.stages) / GIB
    yield f"{plan.layers} layers, {_count(plan.parameters)} parameters, {weights:.1f} GiB of weights over all ranks"
    yield ""
    yield _row(*HEAD, _plural(plan.rows, "row"))
    for s in plan.stages:
        yield _row(
            f"{s.stage}{'*' if s.stage == plan.bottleneck else ' '}",
            s.worker if s.tensor_parallel_size == 1 else f"{s.tensor_parallel_size}x {s.worker}",
            f"{s.first_layer}-{s.last_layer}",
            f"{s.weight_bytes / GIB:.1f} GiB",
            _kv(s.kv_bytes_per_token),
            str(s.kv_tokens),
            _time(s.row_s),
            _time(s.full_step_s),
        )
    yield ""
    yield f"{plan.sequences} sequences of {plan.max_model_len} tokens at once (--max-num-seqs {plan.max_num_seqs}),"
    yield f"{_plural(plan.steps_in_flight, 'step')} in flight: at most {plan.tokens_per_s:.0f} tokens/s;"
    yield f"one short sequence alone: at most {plan.tokens_per_s_alone:.0f} tokens/s."
    yield "Weights and KV are those of one rank. * is the bottleneck. Times are bounds by"
    yield "data sheets of the devices: links and what goes on around a step take more."


def _row(*cells: str) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number > 1 else ''}"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


def _kv(size: int) -> str:
    return f"{size / 1024:.3g} KiB" if size < 1000 * 1024 else f"{size / (1 << 20):.3g} MiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
