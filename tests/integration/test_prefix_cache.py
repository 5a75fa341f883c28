"""Prefix caching on a real mesh of two stages: the same tokens as without it, and the first of them sooner."""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mesh import Mesh, serve

from stagemesh import Client

ROOT = Path(__file__).resolve().parents[2]
COMMON = ("-pp", "2", "--dtype", "float32", "--max-model-len", "1024")


def counted(mesh: Mesh, name: str) -> float:
    """A metric's value."""
    with urllib.request.urlopen(mesh.url + "/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"stagemesh_{name} ")))


def requests() -> list[dict[str, Any]]:
    """Prompts of which most begin alike; greedy and drawn, with penalties, several choices."""
    rng = random.Random(5)
    shared = [rng.randrange(4, 250) for _ in range(200)]
    made: list[dict[str, Any]] = []
    for i in range(12):
        prompt = [*shared[: rng.choice((0, 40, 200, 200))], *(rng.randrange(4, 250) for _ in range(rng.randint(1, 30)))]
        drawn: dict[str, Any] = {"temperature": 0.0} if i % 3 else {"temperature": 0.9, "seed": i}
        if i % 4 == 1:
            drawn |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
        made.append({"prompt": prompt, "max_tokens": 48, "ignore_eos": True, "n": 1 + (i % 5 == 0), **drawn})
    made.append(dict(made[2]))
    return made


def answers(mesh: Mesh) -> list[Any]:
    """Token ids of all choices: all at once, then one after the other in the other order, then a chat's next turn."""

    async def story() -> list[Any]:
        async with Client(mesh.grpc_address) as client:

            async def ask(prompt: list[int], **more: Any) -> list[list[int]]:
                done = await client.generate(prompt, **more)
                return [list(choice.token_ids) for choice in done.choices]

            at_once = await asyncio.gather(*(ask(**request) for request in requests()))
            again = [await ask(**request) for request in reversed(requests())]
            turn: list[list[list[int]]] = []
            prompt = requests()[2]["prompt"]
            for _ in range(3):
                turn.append(await ask(prompt, max_tokens=37, temperature=0, ignore_eos=True))
                prompt = [*prompt, *turn[-1][0], 5, 6, 7]
            return [*at_once, *again, *turn]

    return asyncio.run(story())


def test_the_same_tokens_with_and_without_and_on_few_pages() -> None:
    with serve(*COMMON, "--no-enable-prefix-caching") as mesh:
        expected = answers(mesh)
        assert counted(mesh, "prefix_cache_queries_total") == 0
    with serve(*COMMON) as mesh:
        assert answers(mesh) == expected
        hits, queries = counted(mesh, "prefix_cache_hits_total"), counted(mesh, "prefix_cache_queries_total")
        assert 0.5 * queries < hits < queries
    # 64 pages hold one sequence of the greatest length, and fewer than half of what is asked for at once.
    with serve(*COMMON, "--num-kv-pages", "64") as mesh:
        assert answers(mesh) == expected
        assert counted(mesh, "num_preemptions_total") > 0
        assert counted(mesh, "prefix_cache_hits_total") > 0
        mesh.check_pages_are_free()


def test_the_usage_says_what_was_cached() -> None:
    with serve(*COMMON) as mesh:
        body = {"model": mesh.model, "prompt": list(range(4, 104)), "max_tokens": 2, "ignore_eos": True}
        cached = [mesh.post("/v1/completions", body)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in "12"]
        assert cached == [0, 96]


async def ttft_s(client: Client, prompt: list[int]) -> float:
    """Seconds to the first of eight tokens."""
    began, first = time.monotonic(), 0.0
    async for _ in client.stream(prompt, max_tokens=8, temperature=0, ignore_eos=True):
        first = first or time.monotonic() - began
    return first


@pytest.mark.slow
def test_a_common_prefix_brings_the_first_token_sooner(tmp_path: Path) -> None:
    model = tmp_path / "model"
    command = [sys.executable, str(ROOT / "tools/make_model.py"), "--preset", "100m", "--out", str(model)]
    subprocess.run(command, check=True, timeout=120)
    rng = random.Random(1)

    def prompts(count: int) -> list[list[int]]:
        """63 pages in common, two tokens of their own."""
        prefix = [rng.randrange(4, 16000) for _ in range(1008)]
        return [[*prefix, *(rng.randrange(4, 16000) for _ in range(2))] for _ in range(count)]

    async def story(mesh: Mesh) -> None:
        async with Client(mesh.grpc_address) as client:
            await ttft_s(client, prompts(1)[0])
            first: list[float] = []
            second: list[float] = []
            for _ in range(3):
                one, other = prompts(2)
                first.append(await ttft_s(client, one))
                second.append(await ttft_s(client, other))
            one, *others = prompts(9)
            first.append(await ttft_s(client, one))
            together = await asyncio.gather(*(ttft_s(client, prompt) for prompt in others))
            burst = await asyncio.gather(*(ttft_s(client, prompt) for prompt in prompts(8)))
            print(f"first {first}, second {second}, 8 together {together}, 8 with nothing cached {burst}")
            alone = statistics.median(first)
            assert statistics.median(second) <= 0.15 * alone
            assert statistics.median(together) <= 0.15 * alone
            assert statistics.median(burst) <= 4 * alone, "one computes what is common, the others wait for it"

    with serve(str(model), "-pp", "2", "--max-model-len", "2048") as mesh:
        asyncio.run(story(mesh))
