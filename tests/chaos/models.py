"""Tiny models that keep or read other things than a Llama does, for meshes that are disturbed."""

from __future__ import annotations

from pathlib import Path

from quantized_checkpoints import FORMATS, quantize_folder
from tiny_models import make_checkpoint

MODELS = {
    "mixture": ("mixtral", ""),
    "latent attention": ("deepseek_v3", ""),
    "quantized": ("llama", "gptq act order"),
}
"""Name -> family, and the format of its weights if they are quantized. All have 6 layers."""


def serve_args(name: str, folder: Path) -> tuple[str, ...]:
    """Writes a checkpoint to `folder`. Returns the arguments of `serve` for it."""
    family, format = MODELS[name]
    made = make_checkpoint(family, folder / family)
    if format:
        made = quantize_folder(made, folder / "quantized", FORMATS[format])
    return str(made), "--dtype", "bfloat16"
