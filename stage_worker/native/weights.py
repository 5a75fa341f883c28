"""Reads checkpoint tensors and packs them as weights. Only this rank's part of each is read.

Queries, keys and values become one linear. Gate and up become another one, in alternating blocks of 16 rows, so that
one kernel has both and can multiply them. Their last blocks are filled with zeros.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv.memory import Scratch, zeros
from ..model.checkpoint import Checkpoint
from ..model.cut import WHOLE, Cut, Range
from ..model.dummy import dummy_tensor
from ..model.spec import ShardSpec
from . import ops
from .architecture import Architecture

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
BLOCK = 16
"""Number of rows of gate, and then of up, in the linear that has both."""
_READ_BYTES = 4 << 20
"""Bytes that are read before they are packed. They fit in a cache."""
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


@dataclass(frozen=True)
class Part:
    """This rank's part of one tensor."""

    shape: tuple[int, ...]
    fill: Callable[[Tensor, int], None]
    """Reads rows, from a given one on, into a tensor."""


def is_tied(architecture: Architecture, names: Collection[str]) -> bool:
    """Whether embedding and head are one tensor: both are used if both are stored, as in transformers."""
    stored = EMBEDDING in names or "embed_tokens.weight" in names
    return architecture.tied and not (HEAD in names and stored)


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
        self.tied = is_tied(architecture, names)
        self._renamed = {EMBEDDING: HEAD} if self.tied and HEAD in names else {}
        self._plan = {_of_layer(index, name): entry for index in layers for name, entry in self._layer_plan.items()}
        whole = (architecture.vocab, architecture.hidden)
        if embeds:
            self._plan[EMBEDDING] = whole, WHOLE
        if heads:
            self._plan[NORM] = whole[1:], WHOLE
            self._plan.setdefault(EMBEDDING if self.tied else HEAD, (whole, Cut(0, (spec.part(whole[0]),))))
        self._rows, self._half = Scratch(), Scratch()
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
            for name, (shape, _) in self._plan.items():
                checkpoint.check_shape(self._name_in_file(name), shape)

    def _name_in_file(self, name: str) -> str:
        name = self._renamed.get(name, name)
        return name.removeprefix("model.") if self._bare else name

    def read(self, name: str) -> Tensor:
        """Reads this rank's part of one tensor, in the shard's dtype. Raises CheckpointError."""
        part = self._opened(name)
        out = zeros(part.shape, self._dtype)
        part.fill(out, 0)
        return out

    def pack(self, *names: str, interleave: bool = False) -> tuple[Tensor, int, int]:
        """Reads and packs linears as one, some rows at a time: the unpacked weights are never in memory as a whole.

        Returns the packed weights, and the outputs n and inputs k of the linear. Raises CheckpointError.
        """
        parts = [self._opened(name) for name in names]
        k = parts[0].shape[1]
        n = 2 * _whole_blocks(parts[0].shape[0]) if interleave else sum(part.shape[0] for part in parts)
        packed = ops.panels(n, k, self._dtype)
        step = max(1, _READ_BYTES // (k * self._dtype.itemsize * ops.PANEL)) * ops.PANEL
        for start in range(0, n, step):
            rows = self._rows.tensor((min(step, n - start), k), self._dtype)
            if interleave:
                self._alternate(parts, rows, start // 2)
            else:
                _concatenate(parts, rows, start)
            ops.pack(rows, packed[start:])
        return packed, n, k

    def _alternate(self, parts: Sequence[Part], rows: Tensor, start: int) -> None:
        """Fills `rows` with blocks of each part in turn, from row `start` of each on. Pads their ends with zeros."""
        for i, part in enumerate(parts):
            own = self._half.tensor((len(rows) // 2, rows.shape[1]), self._dtype)
            known = part.shape[0] - start
            part.fill(own[:known], start)
            own[known:] = 0
            rows.view(-1, 2, BLOCK, rows.shape[1])[:, i] = own.view(-1, BLOCK, rows.shape[1])

    def _opened(self, name: str) -> Part:
        shape, cut = self._plan[name]
        checkpoint, in_file = self._checkpoint, self._name_in_file(name)
        dummy = torch.empty(0)
        if checkpoint is None:
            dummy = cut.apply(dummy_tensor(name, torch.Size(shape), self._spec.seed))

        def fill(out: Tensor, start: int) -> None:
            if checkpoint is None:
                out.copy_(dummy[start : start + len(out)])
            else:
                checkpoint.read_into(out, in_file, cut, start)
            self._done += out.nbytes
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)

        return Part(cut.shape(shape), fill)

    def layer(self, index: int) -> LayerWeights:
        """Reads and packs one decoder layer."""
        tensors: list[Tensor] = []

        def keep(tensor: Tensor) -> int:
            tensors.append(tensor)
            return tensor.data_ptr()

        def vector(name: str) -> int | None:
            return keep(self.read(_of_layer(index, name))) if name in self._layer_plan else None

        def linear(*names: str, interleave: bool = False) -> ops.Linear:
            packed, n, k = self.pack(*(_of_layer(index, f"{name}.weight") for name in names), interleave=interleave)
            biases = [
                self.read(_of_layer(index, f"{name}.bias")) for name in names if f"{name}.bias" in self._layer_plan
            ]
            bias = None
            if biases:
                bias = torch.zeros(len(packed))
                bias[:n] = torch.cat(biases)
            return ops.Linear(keep(packed), keep(bias) if bias is not None else None, n, k)

        layer = ops.Layer(
            norm1=vector("input_layernorm.weight"),
            norm2=vector("post_attention_layernorm.weight"),
            q_norm=vector("self_attn.q_norm.weight"),
            k_norm=vector("self_attn.k_norm.weight"),
            qkv=linear(*(f"self_attn.{name}_proj" for name in "qkv")),
            o=linear("self_attn.o_proj"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj", interleave=True),
            down=linear("mlp.down_proj"),
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


def _whole_blocks(rows: int) -> int:
    return -(-rows // BLOCK) * BLOCK


def _concatenate(parts: Sequence[Part], rows: Tensor, start: int) -> None:
    """Fills `rows` from row `start` on of the parts one below the other."""
    for part in parts:
        first, last = max(0, start), min(part.shape[0], start + len(rows))
        if first < last:
            part.fill(rows[first - start : last - start], first)
        start -= part.shape[0]
