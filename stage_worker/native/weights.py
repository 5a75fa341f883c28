"""From checkpoint tensors to packed weights: only this rank's part of each is read.

Queries, keys and values become one linear, and so do gate and up, 16 of the one beside 16 of the other, so that the
kernel that has both at hand multiplies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.checkpoint import Checkpoint, wrong_shape
from ..model.dummy import dummy_tensor
from ..model.spec import ShardSpec
from . import ops
from .architecture import Architecture

Cut = tuple[int, int, int] | None
"""(dimension, first, last): the part of a tensor that this rank holds; None: all of it."""


def part(size: int, spec: ShardSpec) -> tuple[int, int]:
    """This rank's range of `size` things."""
    return size * spec.tp_rank // spec.tp_size, size * (spec.tp_rank + 1) // spec.tp_size


@dataclass
class LayerWeights:
    """One layer; the structure points into the tensors beside it."""

    layer: ops.Layer
    tensors: list[Tensor]

    def again(self) -> LayerWeights:
        """The same weights for another shard, with pages of its own."""
        return LayerWeights(ops.Layer.from_buffer_copy(self.layer), self.tensors)


class Reader:
    """Reads, or for dummy weights invents, tensors by checkpoint name."""

    def __init__(
        self,
        spec: ShardSpec,
        architecture: Architecture,
        dtype: torch.dtype,
        checkpoint: Checkpoint | None,
        on_progress: Callable[[int, int], None] | None,
        *,
        layers: Sequence[int],
        embeds: bool,
        heads: bool,
    ) -> None:
        """`layers`, and whether the embedding, and norm and head are wanted."""
        self._layers, self._embeds, self._heads = layers, embeds, heads
        self._spec, self._a, self._dtype, self._checkpoint = spec, architecture, dtype, checkpoint
        self._on_progress = on_progress
        names = checkpoint.names if checkpoint is not None else []
        # Checkpoints saved from the base model lack the prefix of the causal one.
        self._bare = "embed_tokens.weight" in names and "model.embed_tokens.weight" not in names
        self.bytes_done = 0
        self._total = sum(math.prod(_shape(shape, cut)) for shape, cut in self._plan().values()) * dtype.itemsize
        if checkpoint is not None:
            checkpoint.require([self._name_in_file(name) for name in self._plan()])

    def _plan(self) -> dict[str, tuple[tuple[int, ...], Cut]]:
        """Every tensor of this stage: its whole shape, and this rank's part."""
        spec, a = self._spec, self._a
        plan: dict[str, tuple[tuple[int, ...], Cut]] = {}
        for index in self._layers:
            plan |= {f"model.layers.{index}.{name}": entry for name, entry in _layer_plan(spec, a).items()}
        embedding = "model.embed_tokens.weight"
        if self._embeds:
            plan[embedding] = ((a.vocab, a.hidden), None)
        if self._heads:
            plan["model.norm.weight"] = ((a.hidden,), None)
            head = embedding if a.tied else "lm_head.weight"
            plan.setdefault(head, ((a.vocab, a.hidden), (0, *part(a.vocab, spec))))
        return plan

    def _name_in_file(self, name: str) -> str:
        return name.removeprefix("model.") if self._bare else name

    def read(self, name: str, shape: tuple[int, ...], cut: Cut = None) -> Tensor:
        """One tensor, this rank's part, in the shard's dtype. Raises CheckpointError."""
        if self._checkpoint is None:
            whole = dummy_tensor(name, torch.Size(shape), self._spec.seed)
            tensor = whole if cut is None else whole.narrow(cut[0], cut[1], cut[2] - cut[1])
        else:
            info = self._checkpoint.info(self._name_in_file(name))
            if info.shape != shape:
                raise wrong_shape(info, shape)
            tensor = self._checkpoint.read(info.name, *(() if cut is None else (cut[0], [cut[1:]])))
        tensor = tensor.to(self._dtype).contiguous()
        self.bytes_done += tensor.nbytes
        if self._on_progress is not None:
            self._on_progress(self.bytes_done, self._total)
        return tensor

    def layer(self, index: int) -> LayerWeights:
        """One decoder layer."""
        plan = _layer_plan(self._spec, self._a)
        got = {name: self.read(f"model.layers.{index}.{name}", *entry) for name, entry in plan.items()}
        tensors: list[Tensor] = []

        def keep(tensor: Tensor | None) -> int | None:
            if tensor is None:
                return None
            tensors.append(tensor)
            return tensor.data_ptr()

        def linear(names: list[str], interleave: bool = False) -> ops.Linear:
            weights = [got[f"{name}.weight"] for name in names]
            biases = [got[f"{name}.bias"] for name in names if f"{name}.bias" in got]
            weight = _interleave(*weights) if interleave else torch.cat(weights)
            return self.pack(weight, torch.cat(biases) if biases else None, keep)

        layer = ops.Layer(
            norm1=keep(got["input_layernorm.weight"]),
            norm2=keep(got["post_attention_layernorm.weight"]),
            q_norm=keep(got.get("self_attn.q_norm.weight")),
            k_norm=keep(got.get("self_attn.k_norm.weight")),
            qkv=linear([f"self_attn.{name}_proj" for name in "qkv"]),
            o=linear(["self_attn.o_proj"]),
            gate_up=linear(["mlp.gate_proj", "mlp.up_proj"], interleave=True),
            down=linear(["mlp.down_proj"]),
            window=self._a.windows[index] or 0,
        )
        return LayerWeights(layer, tensors)

    @staticmethod
    def pack(weight: Tensor, bias: Tensor | None, keep: Callable[[Tensor | None], int | None]) -> ops.Linear:
        """A linear of packed panels; `keep` holds its memory."""
        n, k = weight.shape
        whole_bias = None
        if bias is not None:
            whole_bias = torch.zeros(-(-n // ops.PANEL) * ops.PANEL)
            whole_bias[:n] = bias
        return ops.Linear(keep(ops.pack(weight)), keep(whole_bias), n, k)


def _layer_plan(spec: ShardSpec, a: Architecture) -> dict[str, tuple[tuple[int, ...], Cut]]:
    width, kv_width = a.heads * a.head_dim, a.kv_heads * a.head_dim
    q, kv = _times(part(a.heads, spec), a.head_dim), _times(part(a.kv_heads, spec), a.head_dim)
    mlp = part(a.intermediate, spec)
    plan: dict[str, tuple[tuple[int, ...], Cut]] = {
        "input_layernorm.weight": ((a.hidden,), None),
        "post_attention_layernorm.weight": ((a.hidden,), None),
        "self_attn.q_proj.weight": ((width, a.hidden), (0, *q)),
        "self_attn.k_proj.weight": ((kv_width, a.hidden), (0, *kv)),
        "self_attn.v_proj.weight": ((kv_width, a.hidden), (0, *kv)),
        "self_attn.o_proj.weight": ((a.hidden, width), (1, *q)),
        "mlp.gate_proj.weight": ((a.intermediate, a.hidden), (0, *mlp)),
        "mlp.up_proj.weight": ((a.intermediate, a.hidden), (0, *mlp)),
        "mlp.down_proj.weight": ((a.hidden, a.intermediate), (1, *mlp)),
    }
    if a.qkv_bias:
        plan["self_attn.q_proj.bias"] = ((width,), (0, *q))
        plan["self_attn.k_proj.bias"] = plan["self_attn.v_proj.bias"] = ((kv_width,), (0, *kv))
    if a.o_bias and spec.tp_rank == 0:  # added to the sum over ranks once
        plan["self_attn.o_proj.bias"] = ((a.hidden,), None)
    if a.head_norms:
        plan["self_attn.q_norm.weight"] = plan["self_attn.k_norm.weight"] = ((a.head_dim,), None)
    return plan


def _times(bounds: tuple[int, int], by: int) -> tuple[int, int]:
    return bounds[0] * by, bounds[1] * by


def _interleave(gate: Tensor, up: Tensor) -> Tensor:
    """[2 I, H]: 16 rows of the one, 16 of the other, and so on; filled up with zeros to whole blocks."""
    blocks = -(-gate.shape[0] // 16)
    both = torch.zeros(blocks, 2, 16, gate.shape[1], dtype=gate.dtype)
    for which, weight in enumerate((gate, up)):
        padded = torch.zeros(blocks * 16, weight.shape[1], dtype=weight.dtype)
        padded[: weight.shape[0]] = weight
        both[:, which] = padded.view(blocks, 16, -1)
    return both.flatten(0, 2)


def _shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    if cut is None:
        return shape
    return (*shape[: cut[0]], cut[2] - cut[1], *shape[cut[0] + 1 :])
