"""Reads checkpoint tensors and packs them as weights. Only this rank's part of each is read.

Queries, keys and values become one linear. Gate and up become another one, in alternating blocks of 16 rows, so that
one kernel has both and can multiply them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.checkpoint import Checkpoint
from ..model.cut import WHOLE, Cut, Range
from ..model.dummy import dummy_tensor
from ..model.spec import ShardSpec
from . import ops
from .architecture import Architecture

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Plan = dict[str, tuple[tuple[int, ...], Cut]]
"""Tensor name -> its whole shape, and the part of it that this rank holds."""


@dataclass
class LayerWeights:
    """Weights of one layer. `layer` points into `tensors`."""

    layer: ops.Layer
    tensors: list[Tensor]

    def again(self) -> LayerWeights:
        """Returns the same weights for another shard, which sets its own pages."""
        return LayerWeights(ops.Layer.from_buffer_copy(self.layer), self.tensors)


class Reader:
    """Reads tensors by checkpoint name, or makes dummy ones."""

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
        """Plans the read of `layers`, of the embedding if `embeds`, and of norm and head if `heads`.

        Raises CheckpointError if a tensor is missing, or would not be used, and UnsupportedModel if one is quantized.
        """
        self._spec, self._a, self._dtype, self._checkpoint = spec, architecture, dtype, checkpoint
        self._on_progress = on_progress
        self._layer_plan = _layer_plan(spec, architecture)
        names = set(checkpoint.names) if checkpoint is not None else set()
        # Checkpoints saved from the base model lack the prefix of the causal model.
        self._bare = "embed_tokens.weight" in names and EMBEDDING not in names
        self.tied = architecture.tied and not (HEAD in names and (self._bare or EMBEDDING in names))
        """Whether embedding and head are one tensor: both are used if both are stored, as in transformers."""
        self._renamed = {EMBEDDING: HEAD} if self.tied and HEAD in names else {}
        self._plan = {_of_layer(index, name): entry for index in layers for name, entry in self._layer_plan.items()}
        whole = (architecture.vocab, architecture.hidden)
        if embeds:
            self._plan[EMBEDDING] = whole, WHOLE
        if heads:
            self._plan[NORM] = whole[1:], WHOLE
            self._plan.setdefault(EMBEDDING if self.tied else HEAD, (whole, Cut(0, (spec.part(whole[0]),))))
        self._done = 0
        self._total = sum(math.prod(cut.shape(shape)) for shape, cut in self._plan.values()) * dtype.itemsize
        if checkpoint is not None:
            used = [self._name_in_file(name) for name in self._plan]
            missing = [name for name in used if name not in names]
            if missing:
                raise checkpoint.lacking(missing)
            # Only the first rank has some of the biases.
            whole_layer = _layer_plan(dataclasses.replace(spec, tp_rank=0), architecture)
            known = {EMBEDDING, NORM, HEAD, *(_of_layer(index, name) for index in layers for name in whole_layer)}
            checkpoint.check_use(used, set(map(self._name_in_file, known)), layers)

    def _name_in_file(self, name: str) -> str:
        name = self._renamed.get(name, name)
        return name.removeprefix("model.") if self._bare else name

    def read(self, name: str) -> Tensor:
        """Reads this rank's part of one tensor, in the shard's dtype. Raises CheckpointError."""
        shape, cut = self._plan[name]
        if self._checkpoint is None:
            tensor = cut.apply(dummy_tensor(name, torch.Size(shape), self._spec.seed))
        else:
            name = self._name_in_file(name)
            self._checkpoint.check_shape(name, shape)
            tensor = self._checkpoint.read(name, cut)
        tensor = tensor.to(self._dtype).contiguous()
        self._done += tensor.nbytes
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)
        return tensor

    def layer(self, index: int) -> LayerWeights:
        """Reads and packs one decoder layer."""
        got = {name: self.read(_of_layer(index, name)) for name in self._layer_plan}
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
            packed, bias = ops.pack(weight), None
            if biases:
                bias = torch.zeros(len(packed))
                bias[: len(weight)] = torch.cat(biases)
            return ops.Linear(keep(packed), keep(bias), *weight.shape)

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


def _of_layer(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


def _layer_plan(spec: ShardSpec, a: Architecture) -> Plan:
    """Returns the plan of one layer's tensors, by their names within the layer."""
    width, kv_width = a.heads * a.head_dim, a.kv_heads * a.head_dim
    q, kv = _times(spec.part(a.heads), a.head_dim), _times(spec.part(a.kv_heads), a.head_dim)
    mlp = spec.part(a.intermediate)
    plan: Plan = {
        "input_layernorm.weight": ((a.hidden,), WHOLE),
        "post_attention_layernorm.weight": ((a.hidden,), WHOLE),
        "self_attn.q_proj.weight": ((width, a.hidden), Cut(0, (q,))),
        "self_attn.k_proj.weight": ((kv_width, a.hidden), Cut(0, (kv,))),
        "self_attn.v_proj.weight": ((kv_width, a.hidden), Cut(0, (kv,))),
        "self_attn.o_proj.weight": ((a.hidden, width), Cut(1, (q,))),
        "mlp.gate_proj.weight": ((a.intermediate, a.hidden), Cut(0, (mlp,))),
        "mlp.up_proj.weight": ((a.intermediate, a.hidden), Cut(0, (mlp,))),
        "mlp.down_proj.weight": ((a.hidden, a.intermediate), Cut(1, (mlp,))),
    }
    if a.qkv_bias:
        plan["self_attn.q_proj.bias"] = ((width,), Cut(0, (q,)))
        plan["self_attn.k_proj.bias"] = plan["self_attn.v_proj.bias"] = ((kv_width,), Cut(0, (kv,)))
    if a.o_bias and spec.tp_rank == 0:  # The bias is added to the sum over ranks only once.
        plan["self_attn.o_proj.bias"] = ((a.hidden,), WHOLE)
    if a.head_norms:
        plan["self_attn.q_norm.weight"] = plan["self_attn.k_norm.weight"] = ((a.head_dim,), WHOLE)
    return plan


def _times(bounds: Range, by: int) -> Range:
    return bounds[0] * by, bounds[1] * by


def _interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Returns [2 I, H]: blocks of 16 rows of gate and up in turn. The last blocks are filled with zeros."""
    padding = (0, 0, 0, -len(gate) % 16)
    blocks = [torch.nn.functional.pad(weight, padding).view(-1, 16, weight.shape[1]) for weight in (gate, up)]
    return torch.stack(blocks, 1).flatten(0, 2)
