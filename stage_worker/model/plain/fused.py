"""Fewer kernels for norms and rotary embedding on a CUDA device.

A decode step of a small batch is bound by reading weights, and transformers' norm is seven kernels over little data.
The choice does not depend on a model's name. A replacement is compared with the original on random numbers, and is not
used if the two differ by more than rounding.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagemesh.errors import ConfigError

log = logging.getLogger(__name__)

ROPE = "apply_rotary_pos_emb"
"""Name of the rotary embedding function in transformers' model files."""
ROPE_HEAD = 128
_TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Replaces every RMS norm of `model` by PyTorch's, which is one kernel on a CUDA device. Returns how many.

    In 16 bits it rounds once less than transformers' norm, which rounds before it multiplies by the weight.
    """
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.dim() != 1:
            continue
        if isinstance(eps, float) and weight.dtype in _TOLERANCES and not weight.is_meta:
            fused = _rms_norm(weight, eps)
            probe = _random((3, weight.shape[0]), weight.dtype, weight.device)
            try:
                same = _alike(module(probe), fused(probe), weight.dtype)
            except TypeError as e:
                log.info("%s stays as it is: %s", type(module).__name__, e)
                continue
            if same:
                module.forward = fused
                count += 1
    return count


def _rms_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, weight.shape, weight, eps)

    return forward


@torch.inference_mode()
def fuse_rope(model: nn.Module, dtype: torch.dtype, device: torch.device) -> int:
    """Makes the files that define `model` rotate by one Triton kernel on a CUDA device. Returns how many do.

    The function is a global of the model's file, so it changes for every model of this family in the process. On a
    CPU, and for shapes that a stage never has, it computes as before.
    """
    try:
        from ...attention.triton_decode import load_kernels, rotate

        failures: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError, load_kernels().TritonError)
    except ConfigError as e:
        log.info("rotary embedding stays as it is: %s", e.message)
        return 0
    count = 0
    for name in sorted({type(module).__module__ for module in model.modules() if hasattr(module, "layer_idx")}):
        file = sys.modules[name]
        original = getattr(file, ROPE, None)
        if original is None:
            continue
        if not hasattr(original, "stagemesh_original"):
            try:
                if not _rotates_alike(original, rotate, dtype, device):
                    continue
            except failures as e:
                log.warning("rotary embedding of %s stays as it is: %s", name, e)
                continue
            setattr(file, ROPE, _rope(original, rotate))
        count += 1
    return count


def _rope(original: Callable[..., Any], rotate: Callable[..., Any]) -> Callable[..., Any]:
    def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        ours = query.is_cuda and query.dim() == 4 and query.shape[0] == cos.shape[0] == 1 and cos.dim() == 3
        if not ours or args or kwargs or not query.shape[-1] == key.shape[-1] == cos.shape[-1]:
            return original(query, key, cos, sin, *args, **kwargs)
        return rotate(query, key, cos, sin)

    apply.stagemesh_original = original  # type: ignore[attr-defined]
    return apply


def _rotates_alike(
    original: Callable[..., Any], rotate: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> bool:
    query, key = (
        _random((1, 3, heads, ROPE_HEAD), dtype, device, seed).transpose(1, 2) for heads, seed in ((4, 1), (2, 2))
    )
    cos, sin = (_random((1, 3, ROPE_HEAD), dtype, device, seed) for seed in (3, 4))
    found = zip(original(query, key, cos, sin), rotate(query, key, cos, sin), strict=True)
    return all(_alike(expected, got, dtype) for expected, got in found)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _alike(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    tolerance = _TOLERANCES.get(dtype, 0.0)
    return expected.dtype == found.dtype and torch.allclose(
        expected.float(), found.float(), rtol=tolerance, atol=tolerance
    )
