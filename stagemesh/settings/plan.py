"""Settings of `stagemesh plan`: those of `serve` that decide what fits and how fast it is, and the workers."""

from __future__ import annotations

from typing import Literal

from .serve import ServeSettings

PLANNED = frozenset(
    (
        *("dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_kv_pages"),
        *("tensor_parallel_size", "layer_partition", "steps_in_flight", "kv_cache_gib", "gpu_memory_utilization"),
        *("workers", "quantization", "kv_cache_dtype"),
    )
)
"""The settings that have a flag."""


class PlanSettings(ServeSettings):
    """Settings of `stagemesh plan`."""

    workers: str
    """Workers, one for each stage, in stage order: COUNTxKIND[-MEMORYg] with commas between them, such as
    2xh100-80g,1xcpu-256g; gbps=, tflops= and mem= behind a word give a kind its own figures."""
    kv_cache_dtype: Literal["auto", "fp8", "int8"] = "auto"
    """Element type of K and V in pages; auto takes --dtype."""
