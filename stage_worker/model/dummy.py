"""Seeded random weights for `--load-format dummy`, to try and time a mesh without a checkpoint's tensors."""

from __future__ import annotations

import hashlib

import torch


def dummy_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Makes the fp32 weight of parameter `name`. It depends only on (seed, name, shape), not on the split of the model.

    Matrices are normal with variance 1 / fan-in, which keeps activations and logits near one. Norm weights are one.
    Other vectors are small.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
    if len(shape) > 1:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape)
    return torch.randn(shape, generator=generator).mul_(0.02)
