"""A model as the compiled kernels compute it on one rank: its programs, and what they need of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import torch

from ..kv.pool import KvLayerSpec
from ..model.checkpoint import Checkpoint
from ..model.parts.description import Linear
from ..model.parts.model import ModelDescription
from ..model.quantized.weights import Weights
from ..model.spec import ShardSpec
from . import ops
from .description.cache import NotDescribed, describe
from .program.compile import compile_layer
from .program.operations import Attend, NoKernel, Program, parameters_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NotNative(Exception):
    """The reason why the kernels cannot run a model."""


@dataclass(frozen=True)
class KernelModel:
    """The programs of one rank."""

    description: ModelDescription
    dtype: torch.dtype
    programs: tuple[Program, ...]
    """For each kind of layer."""

    def program(self, index: int) -> Program:
        """Returns the program of a layer."""
        return self.programs[self.description.parts.kinds[index]]

    @property
    def widths(self) -> list[int]:
        """Widths of buffers that all programs fit in."""
        return [max(widths) for widths in zip_longest(*(p.widths for p in self.programs), fillvalue=1)]

    def parameters_of(self, index: int) -> list[str]:
        """Returns the names of the parameters that a layer reads."""
        return [f"{self.description.layers}.{index}.{name}" for name in parameters_of(self.program(index))]

    def kv_spec(self, index: int) -> KvLayerSpec:
        """Returns what a layer keeps of a token."""
        attend = next(op for op in self.program(index).operations if isinstance(op, Attend))
        part = attend.part
        value_dim = 0 if attend.in_key else -(-part.value_dim // 16) * 16
        return KvLayerSpec(index, part.kv_heads, part.head_dim, value_dim, part.window)


def read_model(spec: ShardSpec, on_wait: Callable[[], None] | None = None) -> KernelModel:
    """Reads the programs of a spec's model for its rank. Raises NotNative with the reason if there are none.

    `on_wait` is called all the time while another process describes the model.
    """
    if ops.library() is None:
        raise NotNative("they were not built at install, or this processor lacks AVX512-BF16")
    names = Weights(Checkpoint(spec.model_dir)).names if spec.load_format == "auto" else None
    try:
        return compiled(describe(spec.model_dir, names, on_wait=on_wait), spec)
    except (NotDescribed, NoKernel) as e:
        raise NotNative(str(e)) from e


def compiled(description: ModelDescription, spec: ShardSpec) -> KernelModel:
    """Compiles a model for a spec's rank.

    Raises:
        NoKernel: the kernels cannot compute it, or not like this.
    """
    kinds = range(len(description.parts.layers))
    programs = tuple(_program(description, kind, spec.tp_size, spec.tp_rank) for kind in kinds)
    parts, num_layers = description.parts, len(description.parts.kinds)
    if not 0 <= spec.first < spec.last <= num_layers:
        raise NoKernel(f"layers {spec.first}-{spec.last} are not a range of its {num_layers}")
    if spec.page_size % 16 or parts.hidden % 16:
        raise NoKernel(f"pages of {spec.page_size} or {parts.hidden} hidden are not multiples of 16")
    dtype = _DTYPES.get((description.dtype or "") if spec.dtype == "auto" else spec.dtype)
    if dtype is None:
        raise NoKernel("config.json names no dtype")
    return KernelModel(description, dtype, programs)


def _program(description: ModelDescription, kind: int, size: int, rank: int) -> Program:
    layer, shapes = description.parts.layers[kind], description.shapes[kind]
    outputs = {part.name: shapes[f"{part.name}.weight"][0] for part in layer.parts if isinstance(part, Linear)}
    return compile_layer(layer, description.parts.hidden, outputs, size, rank)
