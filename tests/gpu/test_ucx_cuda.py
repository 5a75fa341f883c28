"""Activations from CUDA memory to CUDA memory between two processes: contents, and the route that was taken."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: links in CUDA memory are NOT tested"),
]
HIDDEN, DTYPE = 1024, torch.bfloat16
ROWS = [1, 8, 512, 4096]
TIMEOUT_S = 60.0


def far_side(name: str) -> None:
    """Sends frames of known contents from its own CUDA memory."""
    from stagemesh.stage_worker.links.link import LinkIdentity, LinkSender
    from stagemesh.transport import open_transport

    transport = open_transport(name, device="cuda")
    print(json.dumps({"address": transport.address().hex()}), flush=True)
    told = json.loads(sys.stdin.readline())
    identity = LinkIdentity(told["nonce"], 1, bytes.fromhex(told["secret"]), HIDDEN, DTYPE, 2, max(ROWS))
    link = LinkSender(transport, bytes.fromhex(told["address"]), identity, timeout_s=TIMEOUT_S)
    link.open_lane(0)
    until = time.monotonic() + TIMEOUT_S
    step = 0
    while (step < len(ROWS) or link.unconsumed(0)) and time.monotonic() < until and link.error is None:
        transport.progress()
        link.progress()
        if step < len(ROWS) and link.can_send(0):
            link.send(0, step, frame(step))
            step += 1
    print(json.dumps({"route": link.route}), flush=True)
    sys.stdin.readline()
    link.close()
    transport.close()


def frame(step: int) -> torch.Tensor:
    """[T, H] in CUDA memory, the same on both sides."""
    return torch.arange(ROWS[step] * HIDDEN, device="cuda").remainder(251 + step).view(ROWS[step], HIDDEN).to(DTYPE)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ucx", marks=pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="no ucxx")),
        "tcp",
    ],
)
def test_cuda_memory_crosses_between_two_processes(name: str) -> None:
    from stagemesh.stage_worker.links.link import LinkIdentity, LinkReceiver
    from stagemesh.transport import open_transport

    child = subprocess.Popen(
        [sys.executable, str(Path(__file__)), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        transport = open_transport(name, device="cuda")
        address = bytes.fromhex(json.loads(child.stdout.readline())["address"])
        identity = LinkIdentity(int.from_bytes(os.urandom(4)), 1, os.urandom(16), HIDDEN, DTYPE, 2, max(ROWS))
        link = LinkReceiver(transport, address, identity, device="cuda", timeout_s=TIMEOUT_S)
        link.open_lane(0)
        told = {"address": transport.address().hex(), "nonce": identity.nonce, "secret": identity.secret.hex()}
        child.stdin.write(json.dumps(told) + "\n")
        child.stdin.flush()
        for step, rows in enumerate(ROWS):
            link.post(0, step, (rows, HIDDEN))
            until = time.monotonic() + TIMEOUT_S
            while (tensor := link.ready(0, step)) is None:
                transport.progress()
                link.progress()
                assert link.error is None, link.error
                assert time.monotonic() < until
            assert tensor.is_cuda
            assert torch.equal(tensor, frame(step))
            link.release(0, step)
        route = json.loads(child.stdout.readline())["route"]
        print(f"{name}: {route}")
        assert ("cuda_ipc" in route) == (name == "ucx")
        child.stdin.write("\n")
        child.stdin.flush()
        link.close()
        transport.close()
        assert child.wait(TIMEOUT_S) == 0
    finally:
        if child.poll() is None:
            child.kill()
            child.wait(TIMEOUT_S)
        child.stdin.close()
        child.stdout.close()


if __name__ == "__main__":
    far_side(sys.argv[1])
