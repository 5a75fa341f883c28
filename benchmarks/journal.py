"""What the boundary journal costs: tokens a second with it beside those without, in pairs, in turn.

    python benchmarks/journal.py [MODEL] [--pairs 10]

16 streams of 64 tokens, 128 in, over two stages. The interval is that of the mean of the pairs' ratios (t, 95 %).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from facts import RESULTS, default_model, machine, own_versions, today
from http_load import HttpLoad
from servers import running
from specs import Layout, Peers, ServerSpec, spec_for

STREAMS, PROMPT, OUTPUT, REQUESTS = 16, 128, 64, 64
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 20: 2.09}
"""Student's t of so many pairs."""


def spec(gib: float) -> ServerSpec:
    """Two stages with so much journal."""
    plain = spec_for("stagemesh", Layout(2, 1), Peers(Path()))
    options = [*plain.options, "--journal-gib", str(gib)]
    return ServerSpec(plain.system, plain.shown_command, plain.command, options, {}, plain.health_path)


async def load(url: str, requests: int) -> float:
    """Output tokens a second."""
    client = HttpLoad(int(url.rpartition(":")[2]), STREAMS, OUTPUT, PROMPT, requests=requests)
    began = time.monotonic()
    async with client:
        await client.done()
    client.check()
    return requests * OUTPUT / (time.monotonic() - began)


def rate(model: Path, gib: float, logs: Path) -> float:
    """Of a server of its own, warm."""
    with running(spec(gib), model, logs) as server:
        asyncio.run(load(server.base_url, STREAMS))
        return asyncio.run(load(server.base_url, REQUESTS))


def main() -> int:
    """Measures, and writes `results/journal.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="a Llama checkpoint; default: the seeded 100 M model")
    parser.add_argument("--pairs", type=int, default=10, choices=sorted(T_95))
    given = parser.parse_args()
    pairs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="stagemesh-journal-") as folder:
        model = given.model or default_model(Path(folder))
        for number in range(given.pairs):
            # Each comes first every other time.
            order = (1.0, 0.0) if number % 2 else (0.0, 1.0)
            found = {gib: rate(model, gib, Path(folder)) for gib in order}
            pairs.append((found[1.0], found[0.0]))
            print(f"with {found[1.0]:.0f}, without {found[0.0]:.0f} tok/s", flush=True)
    ratios = [with_it / without for with_it, without in pairs]
    mean = statistics.mean(ratios)
    half = T_95[len(ratios)] * statistics.stdev(ratios) / len(ratios) ** 0.5
    command = f"python benchmarks/journal.py MODEL --pairs {given.pairs}"
    told = {"date": today(), "machine": machine(), "versions": own_versions(), "command": command,
            "pairs_tok_s": pairs, "ratio": mean, "half_interval": half}  # fmt: skip
    (RESULTS / "journal.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    text = (
        f"# What the journal costs\n\nWritten by `{command}` on {today()}, {machine()['cores']} cores, "
        f"{machine()['cpu']}: {STREAMS} streams, {PROMPT} tokens in, {OUTPUT} out, two stages of the 100 M model; a "
        f"server of its own for each, in turn.\n\nThroughput with the journal by that without: {mean:.3f} ± {half:.3f} "
        f"(95 % interval of the mean of {len(ratios)} pairs). Medians: "
        f"{statistics.median(p[0] for p in pairs):.0f} and {statistics.median(p[1] for p in pairs):.0f} tok/s.\n"
    )
    (RESULTS / "journal.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
