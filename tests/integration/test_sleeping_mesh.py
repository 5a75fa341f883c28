"""A mesh of stages that sleep, as real processes: tokens as foretold, at the pace of the sleep."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import mesh

from benchmarks.scale.mesh import PLUGIN
from benchmarks.scale.sleep_shard import FIRST_TOKEN, next_token

ROOT = Path(__file__).resolve().parents[2]
STAGES, STEP_S, TOKENS = 3, 0.02, 20


def test_tokens_cross_every_stage_at_its_pace(tmp_path: Path) -> None:
    script = ROOT / "tools" / "make_model.py"
    subprocess.run([sys.executable, script, "--preset", "tiny", "--out", tmp_path], check=True, timeout=120)
    shape = {"num_hidden_layers": STAGES, "hidden_size": 256, "num_attention_heads": 1, "num_key_value_heads": 1}
    numbers = {**shape, "head_dim": 2, "vocab_size": 512, "max_position_embeddings": 1024, "step_seconds": STEP_S}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "stagemesh_sleep", **numbers}))
    with mesh.serve(str(tmp_path), "--load-format", "dummy", "-pp", str(STAGES), env=PLUGIN) as running:
        began = time.monotonic()
        tokens = running.greedy([FIRST_TOKEN, 50], TOKENS)
        took_s = time.monotonic() - began
    foretold = itertools.accumulate(range(TOKENS), lambda token, _: next_token(token), initial=50)
    assert tokens == list(foretold)[1:]
    # One request alone: each token takes a step of every stage, one after the other.
    assert took_s >= TOKENS * STAGES * STEP_S
