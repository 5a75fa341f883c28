"""Measures the time that the coordinator needs to place 400 layers on 1,000 workers of five kinds."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.results import save
from stagemesh.coordinator.planning.choose import choose
from stagemesh.coordinator.planning.kinds import kinds
from stagemesh.coordinator.planning.placement import Candidate
from stagemesh.coordinator.planning.target import Target
from stagemesh.models.size import CheckpointInfo, Part
from stagemesh.planning.cost import CostModel
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest
from stagemesh.protos.v1.types_pb2 import DeviceInfo, ModelRef, RunLimits

LAYERS, WORKERS, KINDS = 400, 1000, 5
STAGES = (4, 16, 100, 400)
GOAL_S = 1.0
MIB = 1 << 20


def target(stages: int) -> Target:
    """Makes a model of equal layers and a heavier head."""
    limits = RunLimits(
        max_model_len=4096, max_num_seqs=32, max_num_batched_tokens=512, page_size=16, steps_in_flight=stages + 1
    )
    layer, head = 8 * MIB, 64 * MIB
    info = CheckpointInfo(
        hidden_size=1024, vocab_size=32000, dtype="bfloat16", max_position_embeddings=4096, num_kv_heads=8,
        kv_elements_per_token=1024, tied=False, layers=(Part(layer, 2.0 * layer),) * LAYERS,
        embedding=Part(head), head=Part(head, 2.0 * head),
    )  # fmt: skip
    return Target(CostModel(info, limits, "bfloat16"), stages, ModelRef(fingerprint="fingerprint"))


def workers(stages: int) -> list[Candidate]:
    """Makes workers of five kinds with increasing speed and memory. Together they can hold the model."""
    room = (LAYERS // stages + 3) * 40 * MIB
    infos = [
        RegisterRequest(
            worker_id=f"worker-{n}", pool=-1, tp_size=1,
            device=DeviceInfo(
                name=f"kind {n % KINDS}", memory_bytes=room * (1 + n % KINDS),
                flops_per_s=1e12 * (1 + n % KINDS / 2), bytes_per_s=1e10 * (1 + n % KINDS / 2),
            ),
        )
        for n in range(WORKERS)
    ]  # fmt: skip
    return [Candidate(info.worker_id, info.pool, kind) for info, kind in zip(infos, kinds(infos), strict=True)]


def run(out: Path, told: Mapping[str, Any]) -> int:
    """Measures and writes. Returns 1 if a case is above the goal, and prints its profile."""
    cases = []
    for stages in STAGES:
        asked, mesh = target(stages), workers(stages)
        began = time.perf_counter()
        chosen = choose(asked, mesh, [])
        took_s = time.perf_counter() - began
        assert chosen[-1].layers[1] == LAYERS
        cases.append({"stages": stages, "seconds": round(took_s, 3)})
        print(f"{stages} stages: {took_s:.3f} s", flush=True)
        if took_s > GOAL_S:
            print(_where(asked, mesh))
    late = [case for case in cases if case["seconds"] > GOAL_S]
    lines = [
        "# Placing 400 layers on 1,000 workers of five kinds",
        "",
        f"Written by `python -m benchmarks.scale partition` on {told['date']}: `coordinator.planning.choose`, from "
        f"registered workers to the layers of each stage. Goal: {GOAL_S:g} s.",
        "",
        "| stages | seconds |",
        "| --- | --- |",
        *(f"| {case['stages']} | {case['seconds']:.3f} |" for case in cases),
    ]
    save(out, {**told, "layers": LAYERS, "workers": WORKERS, "kinds": KINDS, "cases": cases}, lines)
    return 1 if late else 0


def _where(asked: Target, mesh: list[Candidate]) -> str:
    profile = cProfile.Profile()
    profile.runcall(choose, asked, mesh, [])
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(12)
    return text.getvalue()
