"""The table: stagemesh and vLLM serve the same checkpoint in turn, `vllm bench serve` loads both alike.

    python benchmarks/vllm_table.py --setup DIR            # once: vLLM's own environment
    python benchmarks/vllm_table.py [MODEL] [--rows pp2]   # writes benchmarks/results/vllm-pp2.{json,md}

A row is a layout and how many requests run at once: `pp2` is two stages with 16 at once, `tp2` one stage of two ranks,
`pp2@1` one request at a time. The systems take turns (A B A B), because a machine drifts; a server's life serves every
row of its layout once. Run it with the interpreter that stagemesh is installed in, on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import report
from servers import Layout, RunningServer, System, adopt_orphans, running, spec_for, tail
from vllm_venv import BenchmarkError, check, set_up, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CLIENT_DEADLINE_S = 600.0
CONCURRENCY = 16
SINGLE_PROMPTS = 8
"""Requests of a row that runs one at a time: as many as a busy row would take the better part of a minute."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    layout: Layout
    concurrency: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the client asks for."""

    num_prompts: int = 64
    input_len: int = 128
    output_len: int = 64
    seed: int = 0


def parse_row(name: str) -> Row:
    """`pp2`, `tp2`, `pp2tp2`, each with `@N` for N requests at once. Raises BenchmarkError for anything else."""
    match = re.fullmatch(r"(?:pp([1-9]\d*))?(?:tp([1-9]\d*))?(?:@([1-9]\d*))?", name)
    if match is None or (match[1] is None and match[2] is None):
        raise BenchmarkError(f"row {name!r}: write pp2, tp2 or pp2tp2, and @N for N requests at once")
    return Row(name, Layout(int(match[1] or 1), int(match[2] or 1)), int(match[3] or CONCURRENCY))


def client_command(vllm: str, server: RunningServer, model: str, row: Row, load: Workload, result: Path) -> list[str]:
    """`vllm bench serve` for `row`. Greedy for both: some servers sample where the request does not say."""
    prompts = min(load.num_prompts, SINGLE_PROMPTS) if row.concurrency == 1 else load.num_prompts
    return [
        *(vllm, "bench", "serve", "--backend=openai", "--endpoint=/v1/completions", f"--base-url={server.base_url}"),
        *(f"--model={model}", f"--tokenizer={model}", f"--served-model-name={server.model_name}"),
        *("--dataset-name=random", f"--random-input-len={load.input_len}", f"--random-output-len={load.output_len}"),
        *(f"--num-prompts={prompts}", f"--max-concurrency={row.concurrency}", f"--seed={load.seed}"),
        *("--num-warmups=2", "--temperature=0", "--ignore-eos", "--percentile-metrics=ttft,tpot,itl"),
        *("--metric-percentiles=50,99", "--disable-tqdm", "--save-result"),
        *(f"--result-dir={result.parent}", f"--result-filename={result.name}"),
    ]


def shown_client(row: Row, load: Workload) -> str:
    """The client's command line for a reader: names instead of this machine's paths and ports."""
    process: Any = None
    server = RunningServer("http://127.0.0.1:PORT", "NAME", 0.0, Path(), process)
    return " ".join(client_command("vllm", server, "MODEL", row, load, Path("RESULTS/NAME.json")))


def measure(server: RunningServer, model: Path, row: Row, load: Workload, venv: Path, folder: Path) -> dict[str, Any]:
    """Run the client once. Returns its result file. Raises BenchmarkError, with its log, when it fails."""
    result = folder / f"{server.log.stem}-{row.name}.json"
    log = result.with_suffix(".client.log")
    command = client_command(str(venv / "bin" / "vllm"), server, str(model), row, load, result)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as sink:
        client = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
        try:
            code = client.wait(timeout=CLIENT_DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"the client did not finish within {CLIENT_DEADLINE_S:.0f} s:\n{tail(log)}") from error
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
    if code != 0 or not result.exists():
        raise BenchmarkError(f"vllm bench serve ended with code {code}:\n{tail(log)}")
    measured: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return measured


def to_run(measured: dict[str, Any], row: Row, system: System, repeat: int, start_s: float, load: float) -> report.Run:
    """The client's figures by our names."""
    return report.Run(
        row=row.name,
        system=system,
        repeat=repeat,
        start_s=start_s,
        completed=measured["completed"],
        failed=measured["failed"],
        output_tok_s=measured["output_throughput"],
        ttft_p50_ms=measured["p50_ttft_ms"],
        ttft_p99_ms=measured["p99_ttft_ms"],
        tpot_p50_ms=measured["p50_tpot_ms"],
        tpot_p99_ms=measured["p99_tpot_ms"],
        input_tokens=measured["total_input_tokens"],
        output_tokens=measured["total_output_tokens"],
        duration_s=measured["duration"],
        load_before=load,
    )


def compare(
    model: Path,
    rows: Sequence[Row],
    systems: Sequence[System],
    repeats: int,
    load: Workload,
    venv: Path,
    folder: Path,
) -> tuple[list[report.Run], list[str]]:
    """All runs and the commands of a comparison, server by server in turn."""
    runs: list[report.Run] = []
    commands: list[str] = []
    for layout in dict.fromkeys(row.layout for row in rows):
        for repeat in range(repeats):
            for system in systems:
                spec = spec_for(system, layout, venv)
                commands.append(spec.shown())
                load_before = os.getloadavg()[0]
                with running(spec, model, folder) as server:
                    for row in (row for row in rows if row.layout == layout):
                        measured = measure(server, model, row, load, venv, folder)
                        run = to_run(measured, row, system, repeat, server.start_s, load_before)
                        runs.append(run)
                        print(_progress(run), flush=True)
    commands += [shown_client(row, load) for row in rows]
    return runs, commands


def _progress(run: report.Run) -> str:
    return (
        f"{run.row} {run.system} #{run.repeat}: {run.completed} done, {run.failed} failed, "
        f"{run.output_tok_s:.0f} tok/s, TTFT {run.ttft_p50_ms:.0f}/{run.ttft_p99_ms:.0f} ms, "
        f"TPOT {run.tpot_p50_ms:.1f}/{run.tpot_p99_ms:.1f} ms, start {run.start_s:.1f} s, load {run.load_before:.1f}"
    )


def _versions(venv: Path) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("stagemesh", "torch", "transformers", "grpcio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    theirs = versions(venv, ("vllm", "torch", "transformers"))
    found |= {name if name == "vllm" else f"{name} (vLLM's)": number for name, number in theirs.items()}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    return found | ({"commit": commit.stdout.strip()} if commit.returncode == 0 else {})


def _default_model(folder: Path) -> Path:
    model = folder / "model"
    script = ROOT / "tools" / "make_model.py"
    subprocess.run([sys.executable, str(script), "--preset", "100m", "--out", str(model)], check=True, timeout=300)
    return model


def _systems(text: str) -> list[System]:
    chosen: list[System] = [system for name in text.split(",") for system in get_args(System) if system == name]
    if len(chosen) != len(text.split(",")):
        raise BenchmarkError(f"--systems {text!r}: of {', '.join(get_args(System))}")
    return chosen


def _arguments(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare stagemesh with vLLM on this machine.")
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint folder; without it, the seeded 100 M model")
    parser.add_argument("--setup", type=Path, metavar="DIR", help="only make vLLM's environment in DIR")
    parser.add_argument("--vllm-venv", type=Path, default=os.environ.get("VLLM_VENV"), help="else from VLLM_VENV")
    parser.add_argument("--rows", default="pp2", help="e.g. pp2,pp2@1,tp2")
    parser.add_argument("--repeats", type=int, default=2, help="times that each system's server is started")
    parser.add_argument("--systems", default="stagemesh,vllm", help="one of them alone, to try the other's set-up")
    parser.add_argument("--num-prompts", type=int, default=Workload.num_prompts)
    parser.add_argument("--out", type=Path, help="results without suffix; by default benchmarks/results/vllm-ROWS")
    return parser.parse_args(None if argv is None else list(argv))


def main(argv: Iterable[str] | None = None) -> int:
    """The command line. 0: written and no request failed; 1: some failed; 2: no comparison could be made."""
    arguments = _arguments(argv)
    try:
        if arguments.setup is not None:
            set_up(arguments.setup)
            return 0
        if arguments.vllm_venv is None:
            raise BenchmarkError("name vLLM's environment by --vllm-venv or VLLM_VENV; --setup DIR makes one")
        return _compare_and_write(arguments)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _compare_and_write(arguments: argparse.Namespace) -> int:
    venv: Path = Path(arguments.vllm_venv).absolute()
    check(venv)
    rows = [parse_row(name) for name in arguments.rows.split(",")]
    load = Workload(num_prompts=arguments.num_prompts)
    out: Path = arguments.out or RESULTS / ("vllm-" + "-".join(row.name.replace("@", "x") for row in rows))
    adopt_orphans()
    # A terminated benchmark ends its servers on the way out, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="stagemesh-bench-") as name:
        folder = Path(name)
        model: Path = (arguments.model or _default_model(folder)).absolute()
        systems = _systems(arguments.systems)
        runs, commands = compare(model, rows, systems, arguments.repeats, load, venv, folder)
        facts = {
            "date": report.today(),
            "machine": report.machine(),
            "versions": _versions(venv),
            "model": report.model_facts(model),
            "workload": dataclasses.asdict(load),
            "commands": list(dict.fromkeys(commands)),
        }
    report.write(out, runs, facts)
    print(out.with_name(out.name + ".md").read_text(encoding="utf-8"))
    return 1 if any(run.failed for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
