"""A mesh of real processes that share one CUDA device: stages are lost and layers move, and no token changes."""

from __future__ import annotations

import asyncio

import pytest
import streams
import torch
from disturb import agent_of, check, disturbed, rank_of, stagemesh
from mesh import Mesh, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: no mesh was tried on one"),
]
SEED, STREAMS, MAX_TOKENS = 23, 8, 120
FAST = ("-pp", "3", "--max-model-len", "1024", "--dtype", "float32", "--device", "cuda", "--kv-cache-gib", "1")
COMMON = (*FAST, "--deterministic")
"""What is computed again may be rounded otherwise in fast mode, and a token that is drawn then be another one."""
QUESTIONS = ("What is seven plus five?", "What is two plus two?", "What is nine plus one?")
ABOUT = ("goes over", "captured", "decode attention", "without graphs", "UCX", "WARNING", "ERROR")


def tell(mesh: Mesh) -> None:
    """Prints how the mesh computes and sends."""
    lines = mesh.log.read_text(errors="replace").splitlines()
    print("\n".join(line for line in lines if any(word in line for word in ABOUT)))


@pytest.fixture(scope="module")
def expected() -> list[streams.Stream]:
    """What the streams bring when nothing happens."""
    with serve(*COMMON) as mesh:
        told = streams.make(STREAMS, MAX_TOKENS, SEED)
        asyncio.run(streams.run_all(mesh.grpc_address, told))
        tell(mesh)
        assert all(s.error is None for s in told)
        return told


def answers(mesh: Mesh) -> list[str]:
    """To what the model was trained on, where its greedy path has a clear margin."""
    bodies = [{"messages": [{"role": "user", "content": q}], "temperature": 0, "max_tokens": 24} for q in QUESTIONS]
    done = [mesh.post("/v1/chat/completions", {"model": mesh.model, **body}) for body in bodies]
    return [d["choices"][0]["message"]["content"] for d in done]


def test_captured_steps_give_the_answers_of_a_cpu() -> None:
    with serve("-pp", "2", "--dtype", "float32", "--device", "cpu", "--max-model-len", "1024") as mesh:
        wanted = answers(mesh)
    with serve(*FAST) as mesh:
        assert answers(mesh) == wanted
        tell(mesh)
        assert "captured the decode step" in mesh.log.read_text()


@pytest.mark.parametrize(("stage", "who"), [(0, "rank"), (1, "rank"), (2, "rank"), (1, "agent")])
def test_one_stage_is_lost(expected: list[streams.Stream], stage: int, who: str) -> None:
    with serve(*COMMON, "--standby", "1") as mesh:
        mesh.wait_standbys(1)
        victim = rank_of(mesh, stage) if who == "rank" else agent_of(mesh, stage)
        told = asyncio.run(disturbed(mesh, lambda _: victim.kill(), STREAMS, MAX_TOKENS))
        tell(mesh)
        print(f"longest pause: {max(s.longest_s for s in told):.2f} s")
        check(told, expected)
        mesh.check_pages_are_free()


def test_layers_move(expected: list[streams.Stream]) -> None:
    with serve(*COMMON, "--standby", "1") as mesh:
        mesh.wait_standbys(1)

        def move(_: list[streams.Stream]) -> None:
            for wanted in ("1,4,3", "3,3,2"):
                stagemesh("repartition", wanted, "--url", mesh.url)
            stagemesh("drain", "stage-1", "--url", mesh.url)

        told = asyncio.run(disturbed(mesh, move, STREAMS, MAX_TOKENS))
        events = mesh.get("/mesh")["events"]
        print([(e["event"], e["duration_ms"]) for e in events], f"longest: {max(s.longest_s for s in told):.3f} s")
        check(told, expected)
        assert [e["event"] for e in events] == ["moved"] * 3
        mesh.check_pages_are_free()
