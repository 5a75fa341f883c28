"""The description of a shard that a worker should hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .cut import Range, even_range


@dataclass(frozen=True)
class ShardSpec:
    """A contiguous range of decoder layers of one checkpoint, on one TP rank."""

    model_dir: str
    """Folder with config.json and the safetensors files."""
    first: int
    """First decoder layer. A shard with layer 0 also holds the embedding."""
    last: int
    """One past the last decoder layer. A shard with the model's last layer also holds norm and head."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights and activations; auto is the dtype in the checkpoint's config."""
    device: str = "cpu"
    """Device: cpu, cuda or cuda:N."""
    tp_rank: int = 0
    tp_size: int = 1
    load_format: Literal["auto", "dummy"] = "auto"
    """Source of the weights; dummy is seeded random weights, which do not depend on the split of the model."""
    quantization: Literal["", "int8", "fp8", "int4"] = ""
    """How the weights of linears are quantized while they load. Empty: they stay as the checkpoint has them."""
    seed: int = 0
    """Seed of the dummy weights."""
    page_size: int = 16
    """Number of positions in a KV page."""
    threads: int = 1
    """Number of compute threads, for shards that have their own threads."""
    idle_cores: tuple[int, ...] = ()
    """Cores of other ranks. Each gets a thread for steps during which nothing else computes (`StepBatch.alone`)."""
    deterministic: bool = False
    """Whether a token's result has the same bits whatever else is in its step."""
    enforce_eager: bool = False
    """Whether to use transformers' modules instead of compiled kernels."""

    def part(self, size: int) -> Range:
        """Returns this rank's range of `size` items."""
        return even_range(size, self.tp_size, self.tp_rank)
