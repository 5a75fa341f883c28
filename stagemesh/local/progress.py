"""The output of `serve`: progress while weights load, then the banner."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

MIB = 2**20


class Progress:
    """Loading progress of every worker: bars on a terminal, otherwise a line at each quarter."""

    def __init__(self) -> None:
        self._shown: dict[str, int] = {}
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description:<32}"), BarColumn(), DownloadColumn(binary_units=True))
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()

    def show(self, workers: list[dict[str, Any]]) -> None:
        """Shows `workers`, as /mesh lists them."""
        for worker in workers:
            total, done = int(worker["total_bytes"]), int(worker["loaded_bytes"])
            if not total:
                continue
            layers = worker.get("layers")
            name = worker["worker_id"] + (f" layers {layers['first']}-{layers['last'] - 1}" if layers else "")
            if worker.get("state") == "fetching":
                name = f"{name}, fetching"
            if self._bars is not None:
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=total)
                self._bars.update(self._tasks[name], completed=done, total=total)
                continue
            quarter = 4 * done // total
            if self._shown.get(name, -1) < quarter:
                self._shown[name] = quarter
                print(f"{name}: {done / MIB:.1f} of {total / MIB:.1f} MiB", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Removes the bars."""
        if self._bars is not None:
            self._bars.stop()


def banner(mesh: dict[str, Any], url: str, grpc_address: str, started_at: float, api_key: bool) -> str:
    """Returns the text with URLs, model, a table of stages, and a curl command that works."""
    pipeline = next(p for p in mesh["pipelines"] if p["state"].endswith("SERVING"))
    model, limits = pipeline["model"], pipeline["limits"]
    header = ("stage", "layers", "ranks", "device", "link to next", "KV tokens", "weights")
    rows = [
        (
            str(s["stage"]),
            f"{s['layers']['first']}-{s['layers']['last'] - 1}",
            str(s["tp_size"]),
            s["device"]["kind"],
            s["route"] or "-",
            str(s["num_pages"] * limits["page_size"]),
            f"{int(s['weight_bytes']) / MIB:.1f} MiB",
        )
        for s in pipeline["stages"]
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    table = "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in [header, *rows])
    tokens = min(s["num_pages"] for s in pipeline["stages"]) * limits["page_size"]
    body = json.dumps(
        {
            "model": model["name"],
            "messages": [{"role": "user", "content": "What is seven plus five?"}],
            "max_tokens": 32,
        }
    )
    auth = " -H 'Authorization: Bearer YOUR_KEY'" if api_key else ""
    return (
        f"\nstagemesh serves {model['name']} ({model['num_layers']} layers, {model['dtype']}), "
        f"ready after {time.monotonic() - started_at:.1f} s\n"
        f"  OpenAI API  {url}/v1\n  gRPC        {grpc_address}\n  mesh        {url}/mesh\n\n{table}\n\n"
        f"  {tokens / limits['max_model_len']:.1f} requests of {limits['max_model_len']} tokens fit at once\n\n"
        f"Try:\n  curl -s {url}/v1/chat/completions -H 'Content-Type: application/json'{auth} \\\n    -d '{body}'\n"
    )
