"""Measures the cost of a setting: tokens per second with it and without it, in alternating pairs.

    python -m benchmarks.pairs [MODEL] [--what journal] [--pairs 10]

The load is streams of 128 tokens in and 64 out over two stages. The interval is of the mean ratio (t, 95 %).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.facts import default_model
from benchmarks.common.http_load import tokens_a_second
from benchmarks.common.results import RESULTS, origin, save
from benchmarks.common.servers import Layout, running, stagemesh_spec

PROMPT, OUTPUT = 128, 64
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 20: 2.09}
"""Student's t by number of pairs."""


@dataclass(frozen=True)
class Pair:
    """A comparison and its load."""

    about: str
    with_it: tuple[str, ...]
    without: tuple[str, ...]
    streams: int
    requests: int


PAIRS = {
    "journal": Pair("the journal", ("--journal-gib", "1"), ("--journal-gib", "0"), 16, 64),
    "deterministic": Pair(
        "`--deterministic` with transformers' modules (`--enforce-eager`), which are then computed token by token",
        ("--enforce-eager", "--deterministic"), ("--enforce-eager",), 4, 4,
    ),
}  # fmt: skip


def rate(model: Path, pair: Pair, options: tuple[str, ...], logs: Path) -> float:
    """Measures tokens per second of a new server, after a warm-up."""
    with running(stagemesh_spec(Layout(2, 1), *options), model, logs) as server:
        asyncio.run(tokens_a_second(server.base_url, pair.streams, pair.streams, PROMPT, OUTPUT))
        return asyncio.run(tokens_a_second(server.base_url, pair.streams, pair.requests, PROMPT, OUTPUT))


def main() -> int:
    """Measures, and writes `results/<what>.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="a Llama checkpoint; default: the seeded 100 M model")
    parser.add_argument("--what", default="journal", choices=sorted(PAIRS))
    parser.add_argument("--pairs", type=int, default=10, choices=sorted(T_95))
    given = parser.parse_args()
    pair, rates = PAIRS[given.what], list[tuple[float, float]]()
    with tempfile.TemporaryDirectory(prefix="stagemesh-pairs-") as folder:
        model = given.model or default_model(Path(folder))
        for number in range(given.pairs):
            # The order alternates.
            order = (pair.with_it, pair.without) if number % 2 else (pair.without, pair.with_it)
            found = {options: rate(model, pair, options, Path(folder)) for options in order}
            rates.append((found[pair.with_it], found[pair.without]))
            print(f"with {rates[-1][0]:.1f}, without {rates[-1][1]:.1f} tok/s", flush=True)
    ratios = [with_it / without for with_it, without in rates]
    mean = statistics.mean(ratios)
    half = T_95[len(ratios)] * statistics.stdev(ratios) / len(ratios) ** 0.5
    told = origin(f"pairs MODEL --what {given.what} --pairs {given.pairs}")
    text = (
        f"# What {given.what} costs\n\nWritten by `{told['command']}` on {told['date']}, {told['machine']['cores']} "
        f"cores, {told['machine']['cpu']}: {pair.about}; {pair.streams} streams, {PROMPT} tokens in, {OUTPUT} out, two "
        f"stages of the 100 M model; a server of its own for each, in turn.\n\nThroughput with it by that without: "
        f"{mean:.3f} ± {half:.3f} (95 % interval of the mean of {len(ratios)} pairs). Medians: "
        f"{statistics.median(r[0] for r in rates):.1f} and {statistics.median(r[1] for r in rates):.1f} tok/s."
    )
    save(RESULTS / given.what, {**told, "pairs_tok_s": rates, "ratio": mean, "half_interval": half}, [text])
    return 0


if __name__ == "__main__":
    sys.exit(main())
