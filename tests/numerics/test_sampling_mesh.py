"""The same seed gives the same sampled tokens alone, in a batch of 16, and over 1 or 3 stages (fp32)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import tiny_models
from mesh import Mesh, serve

from stagemesh import Client

PROMPT = [11, 45, 200, 7, 99, 31]
REQUEST = {"max_tokens": 32, "temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 1234, "ignore_eos": True}
PENALIZED = {**REQUEST, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2}


async def sample(mesh: Mesh) -> dict[str, list[list[int]]]:
    """Tokens of the seeded request: alone, among 15 others, with n=3, with penalties."""
    async with Client(mesh.grpc_address) as client:
        alone = await client.generate(PROMPT, **REQUEST)
        others = [
            client.generate([i + 1, 2 * i + 1, 5], max_tokens=40, temperature=1.0, seed=i, ignore_eos=True)
            for i in range(15)
        ]
        crowd = await asyncio.gather(client.generate(PROMPT, **REQUEST), *others)
        several = await client.generate(PROMPT, n=3, **REQUEST)
        penalized = await client.generate(PROMPT, **PENALIZED)
        return {
            "alone": [list(alone.token_ids)],
            "crowd": [list(crowd[0].token_ids)],
            "several": [list(choice.token_ids) for choice in several.choices],
            "penalized": [list(penalized.token_ids)],
        }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_checkpoint("llama", tmp_path_factory.mktemp("sampling") / "model")


def test_a_seed_decides_whatever_runs_beside_it(checkpoint: Path) -> None:
    seen = {}
    for stages in (1, 3):
        with serve(str(checkpoint), "-pp", str(stages), "--dtype", "float32") as mesh:
            seen[stages] = asyncio.run(sample(mesh))
    one = seen[1]
    assert one == seen[3]
    assert one["alone"] == one["crowd"] == one["several"][:1]
    assert len({tuple(tokens) for tokens in one["several"]}) == 3, "choices of one request must differ"
    assert one["penalized"] != one["alone"]
