"""The demo model for training: Llama's mathematics with merged projections, saved under Llama's names.

transformers' own modules would take twice the time at this size: most of a step is small operations.
Shapes: B rows, T tokens per row, H hidden size, N heads, K KV heads, D head size, V vocabulary size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .chat import BOS, EOS_IDS, IGNORED, PAD


@dataclass(frozen=True)
class Shape:
    """The numbers of config.json. Heads, KV heads and the MLP are divisible by a TP size of 2."""

    vocab: int = 768
    hidden: int = 128
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 416
    rope_theta: float = 10_000.0
    eps: float = 1e-5
    max_positions: int = 4096

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden))
        self.mlp_norm = nn.Parameter(torch.ones(shape.hidden))
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Computes x [B, T, H] -> [B, T, H]; cos, sin [T, D]; mask [N/K * T, T] is added to the attention scores."""
        s = self.shape
        b, t, _ = x.shape
        qkv = self.qkv(F.rms_norm(x, (s.hidden,), self.attention_norm, s.eps)).view(b, t, -1, s.head_dim)
        qk, v = qkv.transpose(1, 2).split([s.heads + s.kv_heads, s.kv_heads], dim=1)
        half = s.head_dim // 2
        qk = qk * cos + torch.cat((-qk[..., half:], qk[..., :half]), dim=-1) * sin
        q, k = qk.to(v.dtype).split([s.heads, s.kv_heads], dim=1)
        # This replaces scaled_dot_product_attention, whose backward pass takes a third of the whole step on a CPU.
        # The heads of one KV group are adjacent, as extra queries of one product.
        q = q.reshape(b * s.kv_heads, -1, s.head_dim)
        k, v = k.reshape(b * s.kv_heads, t, s.head_dim), v.reshape(b * s.kv_heads, t, s.head_dim)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=s.head_dim**-0.5)
        attended = torch.bmm(scores.softmax(-1, dtype=v.dtype), v).view(b, s.heads, t, s.head_dim)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, s.hidden))
        gate, up = self.gate_up(F.rms_norm(x, (s.hidden,), self.mlp_norm, s.eps)).chunk(2, dim=-1)
        projected: Tensor = self.down(F.silu(gate) * up)
        return x + projected


class DemoNet(nn.Module):
    """The whole model, with tied input and output embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocab, shape.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        for layer in self.layers:
            assert isinstance(layer, Layer)
            for linear, scale in ((layer.qkv, 1.0), (layer.gate_up, 1.0), (layer.out, 0.25), (layer.down, 0.25)):
                # Outputs into the residual stream start small: 1 / sqrt(2 * layers).
                nn.init.normal_(linear.weight, std=scale * shape.hidden**-0.5 * 0.6)
        angles = torch.outer(
            torch.arange(shape.max_positions).float(),
            shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim),
        ).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy over the targets that are not -100; ids, targets [B, T]."""
        t = ids.shape[1]
        assert isinstance(self.cos, Tensor)
        assert isinstance(self.sin, Tensor)
        x = F.embedding(ids, self.embed)
        mask = torch.full((t, t), float("-inf")).triu(1).repeat(self.shape.heads // self.shape.kv_heads, 1).to(x.dtype)
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t], mask)
        # Half of the positions are questions without a loss. They need no logits.
        spoken = (targets.flatten() != IGNORED).nonzero().squeeze(1)
        x = F.rms_norm(x.flatten(0, 1)[spoken], (self.shape.hidden,), self.norm, self.shape.eps)
        return F.cross_entropy(F.linear(x, self.embed).float(), targets.flatten()[spoken])

    def checkpoint(self) -> dict[str, Tensor]:
        """Returns the parameters in bf16 with the names of transformers' LlamaForCausalLM."""
        s = self.shape
        tensors: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            sizes = [s.hidden, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
            q, k, v = torch.split(layer.qkv.weight, sizes)
            gate, up = layer.gate_up.weight.chunk(2)
            tensors |= {
                f"model.layers.{index}.{name}.weight": tensor
                for name, tensor in {
                    "input_layernorm": layer.attention_norm,
                    "post_attention_layernorm": layer.mlp_norm,
                    "self_attn.q_proj": q,
                    "self_attn.k_proj": k,
                    "self_attn.v_proj": v,
                    "self_attn.o_proj": layer.out.weight,
                    "mlp.gate_proj": gate,
                    "mlp.up_proj": up,
                    "mlp.down_proj": layer.down.weight,
                }.items()
            }
        return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def write_model(net: DemoNet, folder: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors into `folder`."""
    s = net.shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.mlp,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": s.max_positions,
        "rope_theta": s.rope_theta,
        "rms_norm_eps": s.eps,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": BOS,
        "eos_token_id": EOS_IDS,
        "pad_token_id": PAD,
        "dtype": "bfloat16",
    }
    # Sampling is careful by default: at temperature 1, a small model would sometimes miss answers that it knows.
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": EOS_IDS,
        "pad_token_id": PAD,
        "do_sample": True,
        "temperature": 0.2,
        "top_k": 20,
        "top_p": 0.9,
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = folder / "model.safetensors"
    save_file(net.checkpoint(), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it readable only for its owner.
