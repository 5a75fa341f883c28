"""Measures stagemesh, vLLM and llama.cpp on the same checkpoint, with the same load from `vllm bench serve`.

    python -m benchmarks.peers --setup DIR              # once: vLLM's own environment
    python -m benchmarks.peers [MODEL] [--rows table]   # writes benchmarks/results/vllm-ROWS.{json,md}

A row is a layout, a load and a number of concurrent requests. `pp2` is two stages with 16 concurrent requests, `tp2`
one stage of two ranks, `pp2@1` one request at a time, `pp2:long-prompts` another load (workloads.py). The systems take
turns (A B A B), because the speed of a machine drifts. A server is started once for all rows of its layout. Run it on
an idle machine, with the interpreter in which stagemesh is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.common import facts
from benchmarks.common.errors import BenchmarkError
from benchmarks.common.probe import Probe, memory_mib, processes
from benchmarks.common.results import RESULTS
from benchmarks.common.servers import RunningServer, System, adopt_orphans, running, tail

from . import report
from .llama_cpp import LlamaCpp
from .own_costs import OwnCosts, own_costs, weights_and_kv_mib
from .specs import Peers, can_serve, spec_for
from .vllm_venv import check, set_up, versions
from .workloads import Row, client_command, parse_rows, shown_client

CLIENT_DEADLINE_S = 900.0


def measure(server: RunningServer, model: Path, row: Row, venv: Path, folder: Path) -> dict[str, Any]:
    """Runs the client once. Returns its result file's content. Raises BenchmarkError, with its log, if it fails."""
    result = folder / f"{server.log.stem}-{row.file_name}.json"
    log = result.with_suffix(".client.log")
    vllm = str(venv / "bin" / "vllm")
    command = client_command(vllm, server.base_url, server.model_name, str(model), row.load, result)
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


def measure_own(
    server: RunningServer, model: Path, row: Row, venv: Path, folder: Path, pss_start_mib: dict[str, float]
) -> tuple[dict[str, Any], OwnCosts | None]:
    """Runs `measure`, with CPU time and memory of stagemesh's processes."""
    with Probe(server.process.pid, server.base_url) as probe:
        measured = measure(server, model, row, venv, folder)
    spent = probe.spent(measured["duration"])
    if spent is None:
        return measured, None
    single_thread = len(os.sched_getaffinity(0)) <= row.layout.ranks
    memory = (pss_start_mib, memory_mib(processes(server.process.pid)))
    return measured, own_costs(spent, single_thread, memory, weights_and_kv_mib(server.base_url, model))


def to_run(
    measured: dict[str, Any], row: Row, system: System, repeat: int, start_s: float, load: float, own: OwnCosts | None
) -> report.Run:
    """Converts the client's figures to our names."""
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
        itl_p99_ms=measured["p99_itl_ms"],
        input_tokens=measured["total_input_tokens"],
        output_tokens=measured["total_output_tokens"],
        duration_s=measured["duration"],
        load_before=load,
        own=own,
    )


def compare(
    model: Path, rows: Sequence[Row], systems: Sequence[System], repeats: int, peers: Peers, folder: Path
) -> tuple[list[report.Run], list[str]]:
    """Runs a comparison, server by server in turn. Returns all runs and the commands."""
    runs: list[report.Run] = []
    commands: list[str] = []
    for layout in dict.fromkeys(row.layout for row in rows):
        for repeat in range(repeats):
            for system in (system for system in systems if can_serve(system, layout)):
                spec = spec_for(system, layout, peers)
                commands.append(spec.shown())
                load_before = os.getloadavg()[0]
                with running(spec, model, folder) as server:
                    pss_mib = memory_mib(processes(server.process.pid))
                    for row in (row for row in rows if row.layout == layout):
                        own: OwnCosts | None = None
                        if system == "stagemesh":
                            measured, own = measure_own(server, model, row, peers.vllm_venv, folder, pss_mib)
                        else:
                            measured = measure(server, model, row, peers.vllm_venv, folder)
                        runs.append(to_run(measured, row, system, repeat, server.start_s, load_before, own))
                        print(_progress(runs[-1]), flush=True)
    commands += [shown_client(row.load) for row in rows]
    return runs, commands


def _progress(run: report.Run) -> str:
    return (
        f"{run.row} {run.system} #{run.repeat}: {run.completed} done, {run.failed} failed, "
        f"{run.output_tok_s:.0f} tok/s, TTFT {run.ttft_p50_ms:.0f}/{run.ttft_p99_ms:.0f} ms, "
        f"TPOT {run.tpot_p50_ms:.1f}/{run.tpot_p99_ms:.1f} ms, start {run.start_s:.1f} s, load {run.load_before:.1f}"
    )


def _versions(peers: Peers, systems: Sequence[System]) -> dict[str, str]:
    theirs = versions(peers.vllm_venv, ("vllm", "torch", "transformers"))
    found = facts.own_versions()
    found |= {name if name == "vllm" else f"{name} (vLLM's)": number for name, number in theirs.items()}
    if peers.llama_cpp is not None and "llama.cpp" in systems:
        found["llama.cpp"] = peers.llama_cpp.version()
    return found


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
    parser.add_argument("--llama-cpp", type=Path, default=os.environ.get("LLAMA_CPP"), help="else from LLAMA_CPP")
    parser.add_argument("--rows", default="pp2", help="e.g. pp2,pp2@1,tp2,pp2:mixed; `table` for the whole table")
    parser.add_argument("--repeats", type=int, default=2, help="times that each system's server is started")
    parser.add_argument("--systems", default="stagemesh,vllm", help="of stagemesh,vllm,llama.cpp")
    parser.add_argument("--num-prompts", type=int, help="at most so many requests a row, to try a set-up")
    parser.add_argument("--out", type=Path, help="results without suffix; by default benchmarks/results/vllm-ROWS")
    return parser.parse_args(None if argv is None else list(argv))


def main(argv: Iterable[str] | None = None) -> int:
    """Runs the command line. Returns 0 if no request failed, 1 if some failed, 2 if no comparison could be made."""
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
    systems = _systems(arguments.systems)
    rows = parse_rows(arguments.rows, arguments.num_prompts)
    name = "table" if arguments.rows == "table" else "-".join(row.file_name for row in rows)
    out: Path = arguments.out or RESULTS / f"vllm-{name}"
    adopt_orphans()
    # A terminated benchmark ends its servers, as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="stagemesh-bench-") as scratch:
        folder = Path(scratch)
        model: Path = (arguments.model or facts.default_model(folder)).absolute()
        peers = Peers(venv, _llama_cpp(arguments.llama_cpp, model, folder) if "llama.cpp" in systems else None)
        runs, commands = compare(model, rows, systems, arguments.repeats, peers, folder)
        told = {
            "date": facts.today(),
            "machine": facts.machine(),
            "versions": _versions(peers, systems),
            "model": facts.model_facts(model),
            "loads": {row.name: row.load.told() for row in rows},
            "commands": list(dict.fromkeys(commands)),
        }
    report.write(out, runs, told)
    return 1 if any(run.failed for run in runs) else 0


def _llama_cpp(folder: Path | None, model: Path, scratch: Path) -> LlamaCpp:
    if folder is None:
        raise BenchmarkError(
            "name llama.cpp's folder by --llama-cpp or LLAMA_CPP; `python -m benchmarks.peers.llama_cpp` makes one"
        )
    llama = LlamaCpp(Path(folder).absolute())
    llama.check()
    return llama.with_model(model, scratch)


if __name__ == "__main__":
    sys.exit(main())
