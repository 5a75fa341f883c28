"""`stagemesh status`: the mesh as a gateway sees it, for people."""

from __future__ import annotations

import argparse
from typing import Any

from stagemesh.fetch import fetch_json

TIMEOUT_S = 5.0
MIB = 2**20


def fetch_mesh(url: str) -> Any:
    """Returns the mesh as the gateway at `url` sees it. Raises Unavailable if there is no answer."""
    return fetch_json(f"{url}/mesh", TIMEOUT_S)


def run(namespace: argparse.Namespace) -> int:
    """Prints pipelines, stages and workers. Returns 0 if the mesh serves, else 1."""
    mesh = fetch_mesh(namespace.url)
    gateway = mesh["gateway"]
    print(f"{'ready' if mesh['ready'] else 'NOT READY: ' + mesh['reason']}")
    print(f"{gateway['running']} running, {gateway['waiting']} waiting, "
          f"{gateway['free_pages']} of {gateway['total_pages']} KV pages free")  # fmt: skip
    for pipeline in mesh.get("pipelines", []):
        state = pipeline["state"].removeprefix("PIPELINE_STATE_").lower()
        print(f"{pipeline['pipeline_id']} epoch {pipeline['epoch']} {state} {pipeline['reason']}".rstrip())
        for stage in pipeline["stages"]:
            layers = stage["layers"]
            route = f" -> {stage['route']}" if stage["route"] else ""
            print(f"  stage {stage['stage']}: layers {layers['first']}-{layers['last'] - 1} on {stage['worker_id']}, "
                  f"tp {stage['tp_size']}{route}")  # fmt: skip
    for worker in mesh.get("workers", []):
        done, total = int(worker["loaded_bytes"]) / MIB, int(worker["total_bytes"]) / MIB
        how_far = f" ({done:.1f} of {total:.1f} MiB)" if worker["state"] in ("fetching", "loading") and total else ""
        print(f"worker {worker['worker_id']} at {worker['address']}: {worker['state']}{how_far}, "
              f"{worker['device']['name']}")  # fmt: skip
    for change in mesh.get("rebalances", []):
        after = f"{change['after_us'] / 1000:.1f} ms" if change["after_us"] else "not measured yet"
        print(f"{change['pipeline_id']} epoch {change['epoch']} got other ranges: the slowest stage took "
              f"{change['before_us'] / 1000:.1f} ms a step, {change['expected_us'] / 1000:.1f} ms were expected, "
              f"it takes {after}")  # fmt: skip
    for advice in mesh.get("advice", []):
        print(f"advice: {advice}")
    return 0 if mesh["ready"] else 1
