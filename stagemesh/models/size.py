"""The sizes of a model's parts: parameters, work of a token, and KV, from its configuration alone. Pure.

The names of a configuration's values differ between model families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.errors import CheckpointError, UnsupportedModel

from .architectures import ARCHITECTURES
from .support import longest_sequence

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Families whose configuration class ties the embedding unless config.json says otherwise.
TIED_BY_DEFAULT = ("gemma", "gpt2", "cohere", "starcoder", "opt", "bloom", "falcon", "gpt_bigcode")
# Families whose MLP has no gate, and those with such a prefix that have one.
UNGATED = ("gpt", "opt", "bloom", "phi", "falcon", "starcoder", "arcee", "apertus", "nemotron", "jais")
GATED = ("gpt_oss", "phi3", "phi4")


@dataclass(frozen=True)
class Part:
    """Size and work of one decoder layer, of the embedding, or of the head."""

    parameters: int = 0
    flops_per_token: float = 0.0
    """Twice the number of parameters that are multiplied for one token. Only the experts that a token uses count."""
    expert_parameters: int = 0
    """Those of `parameters` that are in routed experts. A step reads the experts that its tokens use."""
    bits: float | None = None
    """Mean bits of a parameter outside of routed experts, with scales, if some are quantized. None: the dtype's."""
    expert_bits: float | None = None
    """The same for parameters of routed experts."""

    def weight_bytes(self, element_bytes: int) -> float:
        """Bytes of the parameters outside of routed experts."""
        bits = 8 * element_bytes if self.bits is None else self.bits
        return (self.parameters - self.expert_parameters) * bits / 8

    def expert_bytes(self, element_bytes: int) -> float:
        """Bytes of all routed experts."""
        bits = 8 * element_bytes if self.expert_bits is None else self.expert_bits
        return self.expert_parameters * bits / 8


@dataclass(frozen=True)
class CheckpointInfo:
    """The properties of a checkpoint that are known before weights are loaded."""

    hidden_size: int
    vocab_size: int
    dtype: str
    """Element type of the weights: "float32", "bfloat16" or "float16"."""
    max_position_embeddings: int
    """The longest sequence that the model is made for, with the scaling of its rotary embedding."""
    num_kv_heads: int
    kv_elements_per_token: int
    """Number of K and V elements of one token in one layer, over all KV heads."""
    tied: bool
    """Whether input embedding and output head are one tensor. If so, first and last stage both hold and count it."""
    layers: tuple[Part, ...]
    embedding: Part
    head: Part
    """Final norm and output head."""
    experts: int = 0
    """Routed experts of a layer that has some."""
    experts_used: int = 0
    """Routed experts that a token uses."""
    latent_elements_per_token: int = 0
    """Number of elements of one token in one layer where pages hold a latent. 0: the model has none."""
    kv_on_every_rank: bool = False
    """Whether tensor-parallel ranks all hold every KV head."""
    quantization: str = ""
    """The method by which the weights are quantized. Empty if they are not."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def total_parameters(self) -> int:
        """Number of parameters of the whole model. A tied embedding counts once."""
        parts = sum(part.parameters for part in (*self.layers, self.embedding, self.head))
        return parts - (self.vocab_size * self.hidden_size if self.tied else 0)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the decoder's part of a configuration. A multimodal checkpoint has it under `text_config`."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and nested else config


class ModelConfig:
    """The numbers of a configuration."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        """`path`: for errors. Raises CheckpointError and UnsupportedModel."""
        self.text = text = text_config(config)
        self._path = path
        self.model_type = str(text.get("model_type") or config.get("model_type") or "")
        self.num_layers = self.number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        self.hidden = self.number("hidden_size", "n_embd", "d_model", "dim")
        self.vocab = self.number("vocab_size")
        self.heads = self.number("num_attention_heads", "n_head", "n_heads")
        self.kv_heads = self.number("num_key_value_heads", "num_kv_heads", "n_head_kv", default=self.heads)
        self.head_dim = self.number("head_dim", default=self.hidden // self.heads)
        self.intermediate = self.number("intermediate_size", "n_inner", "ffn_dim", default=4 * self.hidden)
        self.experts = self.number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=0)
        self.experts_used = self.number("num_experts_per_tok", "moe_topk", "moe_k", default=min(2, self.experts))
        positions = self.number("max_position_embeddings", "n_positions", "max_seq_len", default=2048)
        self.longest = longest_sequence(text, positions)
        self.says_tied: bool | None = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        says = self.says_tied
        self.tied = bool(says) if says is not None else self.model_type.startswith(TIED_BY_DEFAULT)
        stored = next((c[k] for c in (config, text) for k in ("dtype", "torch_dtype") if c.get(k)), None)
        self.dtype = str(stored).removeprefix("torch.") if stored else None
        if self.dtype is not None and self.dtype not in ELEMENT_BYTES:
            raise UnsupportedModel(
                f"{path}: dtype {self.dtype} cannot be served; it must be {', '.join(ELEMENT_BYTES)}: set --dtype "
                "after converting the checkpoint"
            )

    def number(self, *names: str, default: int | None = None) -> int:
        """Returns the first of these values that is there. Raises CheckpointError if it is no whole number."""
        for name in names:
            value = self.text.get(name)
            if isinstance(value, (list, tuple)):  # One number per layer: memory must suffice for the largest.
                value = max((v for v in value if isinstance(v, int)), default=None)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or value < (1 if default is None else 0):
                    raise CheckpointError(f"{self._path}: {name} is {value!r}, a positive whole number is expected")
                return value
        if default is None:
            raise CheckpointError(
                f"{self._path}: no {names[0]} in it; is this the config of a decoder-only language model?"
            )
        return default

    def info(self, parts: Sequence[Part], dtype: str, *, tied: bool, quantization: str = "") -> CheckpointInfo:
        """Makes the description. `parts` are the layers, then the embedding, then the head."""
        known = ARCHITECTURES.get(self.model_type)
        return CheckpointInfo(
            hidden_size=self.hidden,
            vocab_size=self.vocab,
            dtype=dtype,
            max_position_embeddings=self.longest,
            num_kv_heads=self.kv_heads,
            kv_elements_per_token=kv_elements_per_token(self),
            tied=tied,
            layers=tuple(parts[:-2]),
            embedding=parts[-2],
            head=parts[-1],
            experts=self.experts,
            experts_used=self.experts_used,
            latent_elements_per_token=_latent(self),
            kv_on_every_rank=known is not None and not known.cuts,
            quantization=quantization,
        )


def kv_elements_per_token(config: ModelConfig) -> int:
    """Returns the number of elements that pages keep of one token in one layer, over all heads.

    With latent attention, K and V are expanded there, with different widths; see `latent_elements_per_token` for pages
    that hold the latent. Layers with a sliding window keep all positions.
    """
    if not config.text.get("kv_lora_rank"):
        return 2 * config.kv_heads * config.head_dim
    return config.heads * (_latent_head(config) + config.number("v_head_dim", default=config.head_dim))


def _latent(config: ModelConfig) -> int:
    """The latent, and the rotated part of the key that all heads share."""
    rank = config.number("kv_lora_rank", default=0)
    return rank + config.number("qk_rope_head_dim", default=0) if rank else 0


def _latent_head(config: ModelConfig) -> int:
    """Width of a query or key head of latent attention."""
    return config.number("qk_nope_head_dim", default=0) + config.number("qk_rope_head_dim", default=0)


def estimated(config: ModelConfig) -> list[Part]:
    """Estimates the parts by formula: attention and MLP or experts of each layer, then the embedding, then the head.

    Biases, sinks and norms within a layer are left out; they are less than a hundredth.
    """
    table = config.vocab * config.hidden
    layers = [_layer(config, index) for index in range(config.num_layers)]
    return [*layers, Part(table), Part(table + config.hidden, 2.0 * table)]


def _layer(config: ModelConfig, index: int) -> Part:
    h = config.hidden
    gated = config.model_type.startswith(GATED) or not config.model_type.startswith(UNGATED)
    matrices = 3 if gated else 2
    attention = _attention(config)
    if not _has_experts(config, index):
        used = attention + matrices * h * config.intermediate
        return Part(used + 2 * h, 2.0 * used)
    width = config.number("moe_intermediate_size", default=0) or config.intermediate
    shared = config.number("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=0) * width
    shared = config.number("shared_expert_intermediate_size", default=shared)
    expert = matrices * h * width
    always = attention + config.experts * h + matrices * h * shared
    experts = config.experts * expert
    return Part(always + 2 * h + experts, 2.0 * (always + config.experts_used * expert), experts)


def _attention(config: ModelConfig) -> int:
    """Parameters of a layer's attention."""
    h, heads = config.hidden, config.heads
    rank = config.number("kv_lora_rank", default=0)
    if not rank:
        return h * config.head_dim * (2 * heads + 2 * config.kv_heads)
    rope, nope = config.number("qk_rope_head_dim", default=0), config.number("qk_nope_head_dim", default=0)
    value = config.number("v_head_dim", default=config.head_dim)
    q_rank = config.number("q_lora_rank", default=0)
    queries = (h + heads * (nope + rope)) * q_rank if q_rank else h * heads * (nope + rope)
    return queries + h * (rank + rope) + rank * heads * (nope + value) + heads * value * h


def _has_experts(config: ModelConfig, index: int) -> bool:
    """Whether layer `index` has experts. Families say it in different ways; without a word, all layers have some."""
    text = config.text
    kinds = text.get("mlp_layer_types")
    if not config.experts:
        return False
    if isinstance(kinds, list) and index < len(kinds):
        return bool(kinds[index] == "sparse")
    frequency = text.get("moe_layer_freq")
    if isinstance(frequency, list) and index < len(frequency):
        return bool(frequency[index])
    if index in (text.get("mlp_only_layers") or ()):
        return False
    every = config.number("decoder_sparse_step", default=1)
    first = config.number("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", default=0)
    return index >= first and (index + 1) % max(1, every) == 0
