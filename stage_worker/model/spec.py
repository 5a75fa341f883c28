"""What a worker is asked to hold."""

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
    """First decoder layer; 0 also embeds."""
    last: int
    """One past the last decoder layer; the model's layer count also takes norm and head."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the dtype that the checkpoint's config names."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    tp_rank: int = 0
    tp_size: int = 1
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: seeded random weights, no tensor read; the same weights however the model is split."""
    seed: int = 0
    """Seed of the dummy weights."""
    page_size: int = 16
    """Positions of a KV page that the shard will be given."""
    threads: int = 1
    """That compute, where the shard has threads of its own."""
    idle_cores: tuple[int, ...] = ()
    """Cores of others, a thread on each of them for steps beside which nothing else computes (`StepBatch.alone`)."""
    deterministic: bool = False
    """A token's result shall have the same bits whatever else is in its step."""
    enforce_eager: bool = False
    """Serve through transformers' modules, without compiled kernels."""

    def part(self, size: int) -> Range:
        """This rank's range of `size` things."""
        return even_range(size, self.tp_size, self.tp_rank)
