"""Seeded random weights for `--load-format dummy`: a mesh can be tried and timed without a checkpoint's tensors."""

from __future__ import annotations

import hashlib

import torch


def dummy_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """The fp32 weight of parameter `name`: it depends on (seed, name, shape) alone, so on no split of the model.

    Matrices are normal with variance 1 / fan-in, which keeps activations and logits near one; norm weights are one,
    everything else of one dimension is small.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
    if len(shape) > 1:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape)
    return torch.randn(shape, generator=generator).mul_(0.02)
