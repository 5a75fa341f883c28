"""The Triton kernels in Triton's interpreter, on the CPU, against plain functions. Skips where Triton is not installed:
PyTorch for a CPU brings none. `pip install triton "numpy<2.4"` does (its interpreter fails with later ones)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

KINDS = [
    # heads, KV heads, K and V dim, page size, window, softcap, sinks
    (4, 2, 16, 16, 16, None, None, False),
    (8, 1, 64, 64, 16, 40, 2.0, True),
    (6, 6, 24, 20, 4, 1, None, False),
    (5, 1, 8, 8, 1, None, 2.0, True),
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="NO TRITON: its kernels were not interpreted")
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="NUMPY TOO NEW for Triton's interpreter")
def test_kernels_interpreted_give_what_plain_functions_give() -> None:
    # In a process of its own: a kernel that was once imported as interpreted stays so.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, str(Path(__file__))], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stderr


def main() -> int:
    """Every kind in both dtypes that the interpreter can multiply, and the rotation; 0 when all are alike."""
    from stagemesh.stage_worker.attention.decode import LayerKind, difference
    from stagemesh.stage_worker.attention.triton_decode import TritonDecode, rotate

    bad = 0
    for heads, kv_heads, k_dim, v_dim, page, window, softcap, sinks in KINDS:
        for dtype in (torch.float32, torch.float16):
            kind = LayerKind(heads, kv_heads, k_dim, v_dim, page, dtype, 0.3, window, softcap, sinks)
            said = difference(TritonDecode(torch.device("cpu")), kind, torch.device("cpu"))
            print(kind, said or "alike")
            bad += said is not None
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 5, heads, 24, generator=generator).transpose(1, 2) for heads in (8, 2))
    cos, sin = (torch.randn(1, 5, 24, generator=generator) for _ in range(2))
    for expected, found in zip(apply_rotary_pos_emb(query, key, cos, sin), rotate(query, key, cos, sin), strict=True):
        torch.testing.assert_close(found, expected)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
