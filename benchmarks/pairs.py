"""What a setting costs: tokens a second with it beside those without, in pairs, in turn.

    python benchmarks/pairs.py [MODEL] [--what journal] [--pairs 10]

So many streams of 64 tokens, 128 in, over two stages. The interval is that of the mean of the pairs' ratios (t, 95 %).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from facts import RESULTS, default_model, machine, own_versions, today
from http_load import HttpLoad
from servers import running
from specs import Layout, Peers, ServerSpec, spec_for

PROMPT, OUTPUT = 128, 64
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 20: 2.09}
"""Student's t of so many pairs."""


@dataclass(frozen=True)
class Pair:
    """What is compared, and under which load."""

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


def spec(options: tuple[str, ...]) -> ServerSpec:
    """Two stages with these options."""
    plain = spec_for("stagemesh", Layout(2, 1), Peers(Path()))
    return ServerSpec(
        plain.system, plain.shown_command, plain.command, [*plain.options, *options], {}, plain.health_path
    )


async def load(url: str, streams: int, requests: int) -> float:
    """Output tokens a second."""
    client = HttpLoad(int(url.rpartition(":")[2]), streams, OUTPUT, PROMPT, requests=requests)
    began = time.monotonic()
    async with client:
        await client.done()
    client.check()
    return requests * OUTPUT / (time.monotonic() - began)


def rate(model: Path, pair: Pair, options: tuple[str, ...], logs: Path) -> float:
    """Of a server of its own, warm."""
    with running(spec(options), model, logs) as server:
        asyncio.run(load(server.base_url, pair.streams, pair.streams))
        return asyncio.run(load(server.base_url, pair.streams, pair.requests))


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
            # Each comes first every other time.
            order = (pair.with_it, pair.without) if number % 2 else (pair.without, pair.with_it)
            found = {options: rate(model, pair, options, Path(folder)) for options in order}
            rates.append((found[pair.with_it], found[pair.without]))
            print(f"with {rates[-1][0]:.1f}, without {rates[-1][1]:.1f} tok/s", flush=True)
    ratios = [with_it / without for with_it, without in rates]
    mean = statistics.mean(ratios)
    half = T_95[len(ratios)] * statistics.stdev(ratios) / len(ratios) ** 0.5
    command = f"python benchmarks/pairs.py MODEL --what {given.what} --pairs {given.pairs}"
    told = {"date": today(), "machine": machine(), "versions": own_versions(), "command": command,
            "pairs_tok_s": rates, "ratio": mean, "half_interval": half}  # fmt: skip
    (RESULTS / f"{given.what}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    text = (
        f"# What {given.what} costs\n\nWritten by `{command}` on {today()}, {machine()['cores']} cores, "
        f"{machine()['cpu']}: {pair.about}; {pair.streams} streams, {PROMPT} tokens in, {OUTPUT} out, two stages of "
        f"the 100 M model; a server of its own for each, in turn.\n\nThroughput with it by that without: {mean:.3f} ± "
        f"{half:.3f} (95 % interval of the mean of {len(ratios)} pairs). Medians: "
        f"{statistics.median(r[0] for r in rates):.1f} and {statistics.median(r[1] for r in rates):.1f} tok/s.\n"
    )
    (RESULTS / f"{given.what}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
