"""The rows of the table, and `vllm bench serve`'s command line for each."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from benchmarks.common.errors import BenchmarkError

from .specs import Layout


@dataclasses.dataclass(frozen=True)
class Workload:
    """A kind of load. Lengths are in tokens. The prompts share no prefix."""

    name: str
    input_len: int
    output_len: int
    concurrency: int | None
    """Number of concurrent requests from the start on; None: requests come at `rate`."""
    num_prompts: int
    rate: float = 0.0
    """Requests per second, as a Poisson process."""
    spread: float = 0.0
    """Lengths are drawn uniformly from 1 - spread to 1 + spread times those above."""
    seed: int = 0

    def told(self) -> str:
        """Describes the load in words."""
        lengths = f"{self.input_len} tokens in, {self.output_len} out"
        if self.spread:
            lengths += f" on average, each from {1 - self.spread:.1f} to {1 + self.spread:.1f} times that"
        when = f"{self.concurrency} at once" if self.concurrency else f"{self.rate:g} requests a second (Poisson)"
        return f"{lengths}, {when}"


WORKLOADS = {
    load.name: load
    for load in (
        Workload("chat", 128, 64, 16, 64),
        Workload("long-prompts", 1500, 32, 8, 32),
        Workload("long-outputs", 16, 256, 32, 64),
        Workload("mixed", 128, 64, None, 96, rate=4.0, spread=0.9),
    )
}
SINGLE_PROMPTS = 8
"""Number of requests of a row with one request at a time. More would take too long."""
TABLE = ("pp2", "pp2@1", "pp2:long-prompts", "pp2:long-outputs", "pp2:mixed", "tp2", "tp2@1", "pp1", "pp1@1")
"""Rows of the whole table: `--rows table`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    layout: Layout
    load: Workload

    @property
    def file_name(self) -> str:
        """The row's name in a file name."""
        return self.name.replace("@", "x").replace(":", "-")


def parse_rows(text: str, num_prompts: int | None) -> list[Row]:
    """Parses `table`, or names separated by commas; at most `num_prompts` requests per row. Raises BenchmarkError."""
    names = TABLE if text == "table" else text.split(",")
    return [parse_row(name, num_prompts) for name in names]


def parse_row(name: str, num_prompts: int | None = None) -> Row:
    """Parses `pp2`, `tp2` or `pp2tp2`, then `:LOAD` for another load than chat, then `@N` for N concurrent requests.

    Raises BenchmarkError for anything else.
    """
    match = re.fullmatch(r"(?:pp([1-9]\d*))?(?:tp([1-9]\d*))?(?::([a-z-]+))?(?:@([1-9]\d*))?", name)
    if match is None or (match[1] is None and match[2] is None) or (match[3] or "chat") not in WORKLOADS:
        raise BenchmarkError(
            f"row {name!r}: write pp2, tp2 or pp2tp2, then :LOAD ({', '.join(WORKLOADS)}) and @N (N requests at once)"
        )
    load = WORKLOADS[match[3] or "chat"]
    if match[4]:
        at_once = int(match[4])
        prompts = min(load.num_prompts, SINGLE_PROMPTS) if at_once == 1 else load.num_prompts
        load = dataclasses.replace(load, concurrency=at_once, num_prompts=prompts, rate=0.0)
    if num_prompts is not None:
        load = dataclasses.replace(load, num_prompts=min(num_prompts, load.num_prompts))
    return Row(name, Layout(int(match[1] or 1), int(match[2] or 1)), load)


def client_command(vllm: str, base_url: str, served_name: str, model: str, load: Workload, result: Path) -> list[str]:
    """Returns the command `vllm bench serve` for `load`. It is greedy: some servers sample by default."""
    pace = [f"--max-concurrency={load.concurrency}"] if load.concurrency else [f"--request-rate={load.rate:g}"]
    return [
        *(vllm, "bench", "serve", "--backend=openai", "--endpoint=/v1/completions", f"--base-url={base_url}"),
        *(f"--model={model}", f"--tokenizer={model}", f"--served-model-name={served_name}"),
        *("--dataset-name=random", f"--random-input-len={load.input_len}", f"--random-output-len={load.output_len}"),
        *([f"--random-range-ratio={load.spread:g}"] if load.spread else []),
        *(f"--num-prompts={load.num_prompts}", *pace, f"--seed={load.seed}"),
        *("--num-warmups=2", "--temperature=0", "--ignore-eos", "--percentile-metrics=ttft,tpot,itl"),
        *("--metric-percentiles=50,99", "--disable-tqdm", "--save-result"),
        *(f"--result-dir={result.parent}", f"--result-filename={result.name}"),
    ]


def shown_client(load: Workload) -> str:
    """Returns the client's command line for a reader, with names instead of this machine's paths and ports."""
    return " ".join(client_command("vllm", "http://127.0.0.1:PORT", "NAME", "MODEL", load, Path("RESULTS/NAME.json")))
