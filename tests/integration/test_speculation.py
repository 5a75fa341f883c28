"""Speculative decoding on a real mesh of two stages: the same tokens as without, in fewer steps."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mesh import Mesh, serve
from tiny_models import make_checkpoint

import stagemesh
from stagemesh import Client

COMMON = ("-pp", "2", "--dtype", "float32", "--max-model-len", "1024")
CONFIG = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SPECULATIVE = ("--speculative-config", json.dumps(CONFIG))
SEED = 8


DEMO = Path(stagemesh.__file__).parent / "demo_model"


def draft_model(path: Path, most: int = 4) -> tuple[str, str]:
    """The flag that guesses by a model."""
    config = {"method": "draft_model", "model": str(path), "num_speculative_tokens": most}
    return "--speculative-config", json.dumps(config)


def counted(mesh: Mesh, name: str) -> float:
    """A metric's value."""
    with urllib.request.urlopen(mesh.url + "/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"stagemesh_{name} ")))


def when_idle(mesh: Mesh) -> dict[str, Any]:
    """The gateway's load, once the step is back that was ahead of the last stop string."""
    deadline = time.monotonic() + 10
    while (gateway := mesh.get("/mesh")["gateway"])["steps_in_flight"]:
        assert time.monotonic() < deadline, gateway
    return dict(gateway)


def requests() -> list[dict[str, Any]]:
    """Prompts that repeat themselves, and every kind of sampling."""
    rng = random.Random(SEED)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 3},
        {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
        {"temperature": 0.6, "seed": 4, "top_p": 0.9, "presence_penalty": 0.3, "n": 2},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.5, "seed": 5, "top_k": 20, "logprobs": 2},
        {"temperature": 0.0, "ignore_eos": False, "min_tokens": 40},
        {"temperature": 0.8, "seed": 6, "min_p": 0.05},
    ]
    made: list[dict[str, Any]] = []
    for i in range(3 * len(kinds)):
        phrase = [rng.randrange(4, 250) for _ in range(rng.randint(2, 20))]
        prompt = phrase * rng.randint(3, 8)
        made.append({"prompt": prompt, "max_tokens": rng.randint(40, 160), "ignore_eos": True, **kinds[i % len(kinds)]})
    return made


def answers(mesh: Mesh) -> list[Any]:
    """Of all requests at once, then some alone: tokens, why they ended, ids of the likeliest; then texts that stop."""

    async def story() -> list[Any]:
        async with Client(mesh.grpc_address) as client:

            async def ask(prompt: list[int], **more: Any) -> list[Any]:
                done = await client.generate(prompt, **more)
                return [
                    (list(c.token_ids), c.finish_reason, [list(told.top) for told in c.logprobs]) for c in done.choices
                ]

            at_once = await asyncio.gather(*(ask(**request) for request in requests()))
            alone = [await ask(**request) for request in requests()[:8]]
            # The text repeats itself, and ends in the midst of what was guessed.
            whole = await client.generate(requests()[0]["prompt"], max_tokens=80, temperature=0, ignore_eos=True)
            stopped = []
            for end in range(30, len(whole.text), 7):
                stop = [whole.text[end - 6 : end]]
                done = await client.generate(
                    requests()[0]["prompt"], max_tokens=80, temperature=0, ignore_eos=True, stop=stop
                )
                stopped.append((done.text, list(done.token_ids), done.finish_reason))
            return [*at_once, *alone, whole.text, *stopped]

    return asyncio.run(story())


@pytest.fixture(scope="module")
def plain() -> tuple[list[Any], float]:
    """The answers of a mesh that guesses nothing, and how many steps they took."""
    print(f"seed {SEED}")
    with serve(*COMMON) as mesh:
        expected = answers(mesh)
        assert counted(mesh, "spec_decode_num_drafts_total") == 0
        return expected, counted(mesh, 'stage_steps_total{stage="1"}')


def test_the_same_tokens_in_fewer_steps_and_on_few_pages(plain: tuple[list[Any], float]) -> None:
    expected, steps = plain
    with serve(*COMMON, *SPECULATIVE) as mesh:
        assert answers(mesh) == expected
        drafts, guessed, accepted = (
            counted(mesh, f"spec_decode_num_{name}_total") for name in ("drafts", "draft_tokens", "accepted_tokens")
        )
        print(f"{accepted} of {guessed} accepted in {drafts} drafts; {steps} steps without")
        assert accepted > 0.4 * guessed > 200
        assert counted(mesh, 'stage_steps_total{stage="1"}') < steps
    # 64 pages hold one sequence of the greatest length, and fewer than half of what is asked for at once.
    with serve(*COMMON, *SPECULATIVE, "--num-kv-pages", "64") as mesh:
        assert answers(mesh) == expected
        assert counted(mesh, "num_preemptions_total") > 0
        assert counted(mesh, "spec_decode_num_accepted_tokens_total") > 0
        gateway = when_idle(mesh)
        assert gateway["free_pages"] == gateway["total_pages"]


def test_ranks_of_a_stage_agree() -> None:
    """Several ranks a stage: those above 0 learn nothing of guesses but their rows."""
    prompt = requests()[0]["prompt"]
    with serve(*COMMON, "-tp", "2", *SPECULATIVE) as mesh:
        tokens = mesh.greedy(prompt, 100)
        assert counted(mesh, "spec_decode_num_accepted_tokens_total") > 0
    with serve(*COMMON, "-tp", "2") as mesh:
        assert mesh.greedy(prompt, 100) == tokens


def test_a_draft_model_on_the_last_stage_changes_no_token(tmp_path: Path, plain: tuple[list[Any], float]) -> None:
    """The model as its own draft guesses nearly always right; one of random weights hardly ever, and is soon let be."""
    expected, _ = plain
    for more in ((), ("--num-kv-pages", "64"), ("-tp", "2")):
        with serve(*COMMON, *more, *draft_model(DEMO)) as mesh:
            got = answers(mesh)
            assert len(got) == len(expected)
            assert more == ("-tp", "2") or got == expected
            guessed, accepted = (counted(mesh, f"spec_decode_num_{n}_tokens_total") for n in ("draft", "accepted"))
            print(f"{more}: {accepted} of {guessed} accepted")
            # How much is guessed follows from measured times: one slow step at the start, and it is little.
            assert accepted > 0.7 * guessed > 0
            gateway = when_idle(mesh)
            assert gateway["free_pages"] == gateway["total_pages"]
    vocab = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    stranger = make_checkpoint("llama", tmp_path / "stranger", vocab_size=vocab)
    with serve(*COMMON, *draft_model(stranger)) as mesh:
        assert answers(mesh) == expected
        tokens = counted(mesh, "generation_tokens_total")
        guessed, accepted = (counted(mesh, f"spec_decode_num_{n}_tokens_total") for n in ("draft", "accepted"))
        print(f"stranger: {accepted} of {guessed} accepted, {tokens} tokens")
        assert accepted < 0.2 * guessed
        assert guessed < 0.2 * tokens


@pytest.mark.parametrize("missing", [True, False])
def test_a_draft_model_that_cannot_be_is_refused_with_a_reason(tmp_path: Path, missing: bool) -> None:
    path = tmp_path / "none" if missing else make_checkpoint("llama", tmp_path / "other", vocab_size=300)
    done = subprocess.run(
        [sys.executable, "-m", "stagemesh.cli.main", "serve", "--port", "0", *COMMON, *draft_model(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert ("no such directory" if missing else "has a vocabulary of 300, the model has") in done.stderr
    assert "Traceback" not in done.stderr
