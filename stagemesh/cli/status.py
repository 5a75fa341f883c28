"""`stagemesh status`: the mesh as a gateway sees it, for people."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from stagemesh.errors import Unavailable

TIMEOUT_S = 5.0


def fetch(url: str) -> Any:
    """GET `url`/mesh as JSON. Raises Unavailable when nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/mesh", timeout=TIMEOUT_S) as response:
            return json.load(response)
    except (OSError, ValueError) as e:
        raise Unavailable(f"no gateway answers at {url}: {e}; name its address with --url") from e


def show(url: str) -> int:
    """Prints pipelines, stages and workers; 0 when the mesh serves, 1 when not."""
    mesh = fetch(url)
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
        print(f"worker {worker['worker_id']} at {worker['address']}: {worker['state']}, {worker['device']['name']}")
    for change in mesh.get("rebalances", []):
        after = f"{change['after_us'] / 1000:.1f} ms" if change["after_us"] else "not measured yet"
        print(f"{change['pipeline_id']} epoch {change['epoch']} got other ranges: the slowest stage took "
              f"{change['before_us'] / 1000:.1f} ms a step, {change['expected_us'] / 1000:.1f} ms were expected, "
              f"it takes {after}")  # fmt: skip
    for advice in mesh.get("advice", []):
        print(f"advice: {advice}")
    return 0 if mesh["ready"] else 1
