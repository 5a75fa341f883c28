"""`stagemesh bench trace` as a user runs it: on a running mesh, and on one that it starts itself."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mesh import Mesh, serve

from stagemesh.settings.model import DEMO_MODEL

BENCH = (sys.executable, "-m", "stagemesh.cli.main", "bench", "trace")
KEY = "let-me-trace"
TIMEOUT_S = 120
SLACK_US = 0.01
"""Times in the file are rounded to nanoseconds."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with serve("-pp", "2", "--max-model-len", "1024", env={"STAGEMESH_API_KEY": KEY}) as running:
        yield running


def bench(*args: str, key: str | None = KEY) -> subprocess.CompletedProcess[str]:
    """`stagemesh bench trace ARGS`."""
    env = {name: value for name, value in os.environ.items() if name != "STAGEMESH_API_KEY"}
    return subprocess.run(
        [*BENCH, *args],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=env if key is None else {**env, "STAGEMESH_API_KEY": key},
        check=False,
    )


def check_events(path: Path, steps: int) -> None:
    """The trace holds `steps` steps of both stages, the link and the gateway, each in the order of its life."""
    document = json.loads(path.read_text())
    pids = {
        re.split(r"[:(]", e["args"]["name"])[0].strip(): e["pid"]
        for e in document["traceEvents"]
        if e["name"] == "process_name"
    }
    assert set(pids) == {"gateway", "stage 0", "link 0 to 1", "stage 1"}
    lives: dict[int, dict[str, Any]] = defaultdict(dict)
    who = {pid: name for name, pid in pids.items()}
    for event in document["traceEvents"]:
        if event["ph"] in ("X", "b", "e") and event["cat"] != "step":
            number = int(event["name"].split()[1])
            key = f"{who[event['pid']]} {event['cat']}"
            if event["ph"] == "X":
                lives[number][f"{key} begin"], lives[number][f"{key} end"] = event["ts"], event["ts"] + event["dur"]
            else:
                lives[number][f"{key} {'begin' if event['ph'] == 'b' else 'end'}"] = event["ts"]
    assert len(lives) == steps
    for number, life in lives.items():
        for stage in (0, 1):
            order = ["gateway plan begin", "gateway plan end", f"stage {stage} plan waits begin",
                     f"stage {stage} compute begin", f"stage {stage} compute end", "gateway tokens begin",
                     "gateway tokens end"]  # fmt: skip
            times = [life[name] for name in order]
            assert all(a <= b + SLACK_US for a, b in itertools.pairwise(times)), (number, order, times)
            assert life[f"stage {stage} compute end"] <= life[f"stage {stage} report end"] + SLACK_US
        order = ["stage 0 compute end", "link 0 to 1 link end", "stage 1 compute begin", "stage 1 compute end",
                 "stage 1 report end", "gateway tokens begin"]  # fmt: skip
        times = [life[name] for name in order]
        assert all(a <= b + SLACK_US for a, b in itertools.pairwise(times)), (number, order, times)
    clocks = document["otherData"]["clocks"]
    assert all(clock["shared_with_gateway"] and clock["uncertainty_us"] < 20_000 for clock in clocks.values())


def test_a_running_mesh_under_load(mesh: Mesh, tmp_path: Path) -> None:
    done = bench("--url", mesh.url, "--steps", "600", "--load", "4x40x40", "--out", str(tmp_path / "new"))
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    check_events(tmp_path / "new/trace.json", 600)
    assert len(ET.parse(tmp_path / "new/trace.svg").getroot().findall(".//{*}title")) > 48 * 4
    said = done.stdout
    assert "load: 4 requests at once, 40 tokens in, 40 out, seed 0" in said
    assert "600 steps of stagemesh-demo" in said
    assert re.search(r"slowest stage \([01]\) has a step to compute: \d\.\d\d of its time \(goal >= 0\.92: ", said)
    assert re.search(r"non-compute CPU share: \d\.\d\d \(goal <= 0\.15: ", said)
    for role in ("gateway", "coordinator", "serve", "stage 0 agent", "stage 1 agent", r"stage 0 .*rank 0"):
        assert re.search(rf"^  {role} +\d+\.\d\d ", said, re.MULTILINE), role
    # The load ends with the trace: nothing of it goes on.
    deadline = time.monotonic() + 5
    while mesh.get("/mesh")["gateway"]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_requests_of_others_are_traced(mesh: Mesh, tmp_path: Path) -> None:
    tracing = subprocess.Popen(
        [*BENCH, "--url", mesh.url, "--api-key", KEY, "--steps", "5", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while tracing.poll() is None and time.monotonic() < deadline:
        mesh_post(mesh)
    assert tracing.communicate(timeout=10)[0].count("goal") == 2
    check_events(tmp_path / "trace.json", 5)


def mesh_post(mesh: Mesh) -> None:
    """One short completion."""
    request = urllib.request.Request(
        mesh.url + "/v1/completions",
        json.dumps({"prompt": [7, 8, 9], "max_tokens": 4, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    urllib.request.urlopen(request, timeout=30).close()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "5000"], "steps is 5000; it must be between 1 and 4096"),
        (["--steps", "0"], "steps is 0; it must be between 1 and 4096"),
        (["--timeout", "301"], "at most 300 seconds"),
        (["--timeout", "0.2"], "no step was run within 0.2 s: send requests"),
        (["--load", "2x5000x10"], "a request of the load failed: this model's maximum context length is 1024 tokens"),
    ],
)
def test_what_cannot_be_traced_is_said(mesh: Mesh, tmp_path: Path, args: list[str], words: str) -> None:
    done = bench("--url", mesh.url, *args, "--out", str(tmp_path))
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_key(mesh: Mesh, tmp_path: Path) -> None:
    done = bench("--url", mesh.url, "--out", str(tmp_path), key="wrong")
    assert done.returncode == 1
    assert "401: the API key is not right" in done.stderr


def left_of(process: psutil.Process) -> list[psutil.Process]:
    """Its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def test_a_mesh_of_its_own(tmp_path: Path) -> None:
    done = bench(
        "demo", "-pp", "2", "--steps", "60", "--load", "3x20x20", "--seed", "4", "--out", str(tmp_path), key=None
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    check_events(tmp_path / "trace.json", 60)
    assert "stage 1 agent" in done.stdout or "shorter than two samples" in done.stdout


def test_a_mesh_of_its_own_that_cannot_start(tmp_path: Path) -> None:
    done = bench(str(DEMO_MODEL), "-pp", "20", "--out", str(tmp_path), key=None)
    assert done.returncode == 2
    assert "the mesh did not start" in done.stderr
    assert "20" in done.stderr


def test_told_to_end_it_ends_its_mesh(tmp_path: Path) -> None:
    process = psutil.Popen(
        [*BENCH, "demo", "--steps", "4000", "--load", "1x5x5", "--timeout", "250", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while len(left := left_of(process)) < 5:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(left, timeout=2)[1]
    finally:
        for one in [*left_of(process), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
