"""Real processes, real gRPC, real links: greedy tokens equal those of the unsplit model under transformers, in fp32.

Pairwise combinations run in CI, all of them by `make numerics`. Prompts are chosen so that the two likeliest tokens
never come close: rounding cannot excuse a difference. Not one token may differ.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from chain import Chain
from mesh import Mesh, serve
from pairwise import all_combinations, pairwise

from stagemesh import Client

SEED = 7
LENGTHS = (1, 2, 16, 17, 63, 130, 300, 511, 700)
SHORT = 130
REQUESTS = 18
OUTPUT = 24
LAYERS = 6
FACTORS: dict[str, tuple[Any, ...]] = {
    "family": ("llama", "qwen3", "mistral_sw", "gemma2", "gpt_neox", "mixtral"),
    "stages": (2, 3, 1, 5),
    "tp": ("1", "2+1", "2"),
    "transport": ("ucx", "tcp"),
    "chunk": (16, 96, 512),
    "pages": ("plenty", "few"),
    "guesses": ("off", "on"),
}
PAIRWISE = pairwise({**FACTORS, "family": tuple(name for name in FACTORS["family"] if name != "gpt_neox")}, least=2)
"""Without those that would be run for a single pair, such as one family on one stage."""


def _ident(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


CASES = [
    pytest.param(case, id=_ident(case), marks=() if case in PAIRWISE else pytest.mark.slow)
    for case in all_combinations(FACTORS)
]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (checkpoint, prompts with the whole model's tokens); made once a session."""

    @functools.cache
    def of(family: str) -> tuple[Path, list[tiny_models.ClearPrompt]]:
        folder = tiny_models.make_checkpoint(family, tmp_path_factory.mktemp(family) / "model")
        prompts = tiny_models.clear_prompts(folder, LENGTHS, OUTPUT, seed=SEED)
        # The check can fail: without what the cache holds, every one of these outputs is another.
        forgot = Chain(folder, (0, LAYERS)).greedy([p.prompt_ids for p in prompts], OUTPUT, forget=True)
        assert all(some != p.tokens for some, p in zip(forgot, prompts, strict=True))
        return folder, prompts

    return of


def lengths(case: dict[str, Any]) -> list[int]:
    """Of the case's prompts. Where pages are few no longer than what leaves several requests growing side by side."""
    return [length for length in LENGTHS if case["pages"] == "plenty" or length <= SHORT]


def flags(case: dict[str, Any]) -> list[str]:
    """The command line of a case. `2+1` alternates over the stages."""
    stages = case["stages"]
    tp = case["tp"] if case["tp"] != "2+1" else ",".join(str(2 - i % 2) for i in range(stages))
    out = ["-pp", str(stages), "-tp", tp, "--transport", case["transport"], "--dtype", "float32"]
    max_model_len = max(lengths(case)) + OUTPUT
    out += ["--max-model-len", str(max_model_len), "--max-num-batched-tokens", str(case["chunk"])]
    if case["pages"] == "few":
        # One sequence of --max-model-len and no more: the rest waits, and is preempted.
        out += ["--block-size", "4", "--num-kv-pages", str(-(-max_model_len // 4))]
    if case["guesses"] == "on":
        config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
        out += ["--speculative-config", json.dumps(config)]
    return out


async def generate_all(
    mesh: Mesh, prompts: list[tiny_models.ClearPrompt], within_s: float
) -> list[tuple[tiny_models.ClearPrompt, list[int]]]:
    """The prompts in turn as `REQUESTS` requests, which arrive within so many seconds; with their tokens."""
    spread = random.Random(SEED)

    async with Client(mesh.grpc_address) as client:

        async def one(prompt: tiny_models.ClearPrompt, delay_s: float) -> list[int]:
            await asyncio.sleep(delay_s)  # An arrival time, not a wait for something to settle.
            done = await client.generate(prompt.prompt_ids, max_tokens=OUTPUT, temperature=0, ignore_eos=True)
            return list(done.token_ids)

        order = [prompts[i % len(prompts)] for i in range(REQUESTS)]
        tokens = await asyncio.gather(*(one(prompt, spread.uniform(0, within_s)) for prompt in order))
        return list(zip(order, tokens, strict=True))


def metric(mesh: Mesh, name: str) -> float:
    """One value of /metrics."""
    with urllib.request.urlopen(mesh.url + "/metrics", timeout=10) as response:
        found = re.search(rf"^{name} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found, f"no {name} in /metrics"
    return float(found.group(1))


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_the_whole_model(case: dict[str, Any], checkpoints: Any) -> None:
    folder, prompts = checkpoints(case["family"])
    print(f"seed {SEED}, case {case}")
    with serve(str(folder), *flags(case)) as mesh:
        # Where pages are to run out all come at once: spread out, a fast machine ends one before the next is there.
        some = [prompt for prompt in prompts if len(prompt.prompt_ids) in lengths(case)]
        done = asyncio.run(generate_all(mesh, some, 0.0 if case["pages"] == "few" else 1.5))
        if case["pages"] == "few":
            count = metric(mesh, "stagemesh_num_preemptions_total")
            print(f"{count:.0f} preemptions")
            assert count > 0, "few pages, and nobody was preempted"
        for i, (prompt, tokens) in enumerate(done):
            assert tokens == prompt.tokens, f"request {i}, prompt of {len(prompt.prompt_ids)} tokens"
        if case["guesses"] == "on":
            assert metric(mesh, "stagemesh_spec_decode_num_draft_tokens_total") > 0, "nothing was ever guessed"
        gateway = mesh.get("/mesh")["gateway"]
        assert gateway["free_pages"] == gateway["total_pages"], "pages leaked"
        routes = [stage["route"] for stage in mesh.get("/mesh")["pipelines"][0]["stages"]][:-1]
        wanted = "tcp" if case["transport"] == "tcp" else "shared memory"
        assert all(route == wanted for route in routes), routes
