"""Options for the served model and its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from stagemesh.hub.reference import served_name

from .blocks import Revision

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"


class ModelSettings(Revision):
    """The served model and its bounds. The coordinator tells them to the other services."""

    model: str = str(DEMO_MODEL)
    """Directory of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json), or the id of one on a hub
    (org/name, org/name@revision); default: the small model that ships with the package."""
    served_model_name: str | None = None
    """Name that clients use; default: the directory's name, or the id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of weights, activations and KV; auto takes the checkpoint's."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy makes seeded random weights without reading any."""
    quantization: Literal["int8", "fp8", "int4"] | None = None
    """Quantize the weights of a checkpoint that is not quantized while it loads; default: leave them as they are."""
    seed: int = Field(0, ge=0)
    """Seed of dummy weights."""
    max_model_len: int | None = Field(None, ge=2)
    """Longest sequence, prompt and output together; default: the model's, at most 4096 on a CPU."""
    max_num_seqs: int = Field(32, ge=1, le=4096)
    """Largest number of sequences that run at once."""
    max_num_batched_tokens: int = Field(512, ge=1, le=65536)
    """Largest number of tokens in one step; longer prompts are split into chunks."""
    block_size: int = Field(16, ge=1, le=1024)
    """Token positions of one KV page."""
    num_kv_pages: int | None = Field(None, ge=1)
    """Number of KV pages of each stage; default: as many as memory allows."""
    deterministic: bool = False
    """Give the same tokens, bit for bit, whatever else is served and after any recovery. This costs nothing with the
    compiled kernels; models without them are computed token by token."""

    @property
    def name(self) -> str:
        """The served name."""
        if self.served_model_name:
            return self.served_model_name
        return "stagemesh-demo" if self.model == str(DEMO_MODEL) else served_name(self.model)
