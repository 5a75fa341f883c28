"""The fast shard: the same layers as the plain one, through the compiled kernels (stage.cpp).

Weights of linears are packed at load. Queries, keys and values are one linear, gate and up another. Norms, rotary
embedding, cache write, attention and residual sums are fused around them. Pages have the kernels' own layout of keys
and values (attention.h). The plain shard is the reference, and serves models that the kernels do not support.

Shapes: T tokens in the step, R rows that need logits, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import ctypes
import dataclasses
from array import array
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stagemesh.errors import ConfigError, InternalError

from ..kv.memory import zeros
from ..kv.pool import KvLayerSpec, KvPool
from ..model.batch import StepBatch, lay_out
from ..model.checkpoint import Checkpoint
from ..model.parts.description import Rotary
from ..model.quantized.weights import Weights
from ..model.spec import ShardSpec
from . import ops, structures
from .assemble import Assembled, assemble, final_norm, rotaries_of
from .exchange import Exchange
from .model import KernelModel
from .packing import Packing
from .weights import Matrix, Parameters


class NativeShard:
    """Layers [first, last) of one model on one rank, over compiled kernels."""

    on_layer: Callable[[], None] | None = None
    """Callback between layers, in which the caller can drive its transports."""
    kv_layout = "compiled kernels"
    """Name of the layout within a page; see `Shard`."""
    _engine: ops.StageEngine
    """The engine, made with the first pages. Its threads inherit the priority of the thread that makes it, so it is
    not made by a loading thread, which may have a low one."""
    _embedding: Tensor | None = None
    """Embedding [V, H], or the head's panels if they serve as the embedding, too."""
    _is_packed = False
    """Whether `_embedding` is panels."""
    _norm: Assembled | None = None
    _packed_head: Tensor | None = None
    _head_bias: Tensor | None = None
    _head: structures.Linear
    """The linear of the packed head."""

    def __init__(
        self,
        spec: ShardSpec,
        model: KernelModel,
        exchange: Exchange | None,
        on_progress: Callable[[int, int], None] | None = None,
        before: NativeShard | None = None,
    ) -> None:
        """Reads the weights that `before`, a shard of the same model, does not have.

        Raises:
            CheckpointError: a tensor is missing, has the wrong shape, or its file is damaged.
            ConfigError: there are several ranks and no exchange.
        """
        parts = model.description.parts
        self.num_layers, self.first, self.last = len(parts.kinds), spec.first, spec.last
        self.is_first, self.is_last = spec.first == 0, spec.last == self.num_layers
        self.hidden_size, self.vocab_size = parts.hidden, parts.vocab
        self.dtype, self.device = model.dtype, torch.device("cpu")
        if spec.tp_size > 1 and (exchange is None or exchange.size != spec.tp_size):
            raise ConfigError(f"{spec.tp_size} ranks need shared memory to meet in")
        self._spec, self._model, self._exchange = spec, model, exchange
        self._parts = parts
        weights = Weights(Checkpoint(spec.model_dir)) if spec.load_format == "auto" else None
        if spec.quantization and weights is not None and weights.quantized.quantization is not None:
            raise ConfigError(
                f"{spec.model_dir} is quantized already, and cannot be by --quantization {spec.quantization}"
            )
        rotaries = rotaries_of(model.programs)
        known = before._weights if before is not None else {}
        new = [index for index in range(spec.first, spec.last) if index not in known]
        done = total = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done = min(done + count, total)
            if on_progress is not None:
                on_progress(done, total)

        parameters = Parameters(model.description, weights, self.dtype, spec.seed, spec.quantization, on_bytes)
        # One copy serves embedding and head: a token's row is gathered from the panels.
        one_copy = parameters.tied and not parameters.is_quantized(parameters.head)
        self._shares_head = one_copy and self.is_first and self.is_last and spec.tp_size == 1
        reads_head = self.is_last and not (before is not None and before.is_last)
        reads_embedding = self.is_first and not self._shares_head and not (before is not None and before.is_first)
        ends = [model.description.embedding] * reads_embedding
        if reads_head:
            ends += [*parameters.norm, parameters.head, *([f"{model.description.head}.bias"] * parts.head_bias)]
        wanted = [name for index in new for name in model.parameters_of(index)]
        parameters.check([*wanted, *ends], new)
        # Some parameters are not divided among ranks. Then the last ones do not count.
        total = parameters.bytes_of([*wanted, *ends]) // spec.tp_size
        self._weights: dict[int, Assembled] = {}
        for index in range(spec.first, spec.last):
            if index in known:
                self._weights[index] = known[index].again()
                continue
            prefix = f"{model.description.layers}.{index}."
            program = model.program(index)
            self._weights[index] = assemble(program, parameters, prefix, self.dtype, rotaries, spec.tp_rank == 0)
        self._read_ends(parameters, before)
        if done < total:
            on_bytes(total - done)
        tensors = [tensor for weights in self._weights.values() for tensor in weights.tensors]
        tensors += [end for end in (self._embedding, self._packed_head, self._head_bias) if end is not None]
        tensors += self._norm.tensors if self._norm is not None else []
        # Keyed by address: one copy may serve both embedding and head.
        self.weight_bytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
        self.tensor_bytes_read = weights.checkpoint.tensor_bytes_read if weights is not None else 0
        self.kv_layers: list[KvLayerSpec] = [model.kv_spec(index) for index in range(spec.first, spec.last)]
        self._shape = self._make_shape(rotaries)
        self._pool: KvPool | None = None

    def _make_shape(self, rotaries: list[Rotary]) -> structures.Shape:
        spec = self._spec
        self._frequencies = [torch.tensor(rotary.frequencies, dtype=torch.float32) for rotary in rotaries]
        self._rotaries = (structures.Rotary * max(1, len(rotaries)))(
            *(
                structures.Rotary(angles.data_ptr(), len(angles), rotary.scale)
                for angles, rotary in zip(self._frequencies, rotaries, strict=True)
            )
        )
        self._widths = array("i", self._model.widths)
        self._idle_cores = array("i", spec.idle_cores)
        self.cores = max(1, spec.threads), max(1, spec.threads) + len(spec.idle_cores)
        return structures.Shape(
            dtype=structures.DTYPES[self.dtype],
            hidden=self.hidden_size,
            page_size=spec.page_size,
            widths=self._widths.buffer_info()[0],
            buffers=len(self._widths),
            rotaries=ctypes.addressof(self._rotaries),
            rotary_count=len(rotaries),
            threads=max(1, spec.threads),
            tp_rank=spec.tp_rank,
            tp_size=spec.tp_size,
            idle_cores=self._idle_cores.buffer_info()[0],
            idle_count=len(self._idle_cores),
        )

    def same_model(self, spec: ShardSpec) -> bool:
        """Whether a shard of `spec` has the same weights in common layers."""
        return dataclasses.replace(spec, first=self.first, last=self.last) == self._spec

    def _read_ends(self, parameters: Parameters, before: NativeShard | None) -> None:
        """Sets embedding, norm and head. Takes those of `before` if it has them."""
        description, parts = self._model.description, self._parts
        if self.is_first and not self._shares_head:
            if before is not None and before.is_first:
                self._embedding, self._is_packed = before._embedding, before._is_packed
            else:
                matrix = parameters.matrix(description.embedding)
                self._embedding = zeros(matrix.shape, self.dtype)
                matrix.fill(self._embedding, 0)
        if self.is_last and before is not None and before.is_last:
            self._norm, self._head, self._head_bias = before._norm, before._head, before._head_bias
            self._packed_head = before._packed_head
        elif self.is_last:
            self._norm = final_norm(parts.final_norm, parts.hidden, parameters, description.norm, self.dtype)
            first, last = self._spec.part(parts.vocab)
            matrix = parameters.matrix(parameters.head, range(first, last))
            if parameters.tied and self._embedding is not None and not self._is_packed:
                matrix = Matrix(matrix.shape, partial(_copy_rows, self._embedding[first:last]))
            packing = Packing([matrix], self.dtype)
            self._packed_head, self._head = packing.memory(), packing.linear
            packing.write(self._packed_head, parameters.scratch)
            self._head.weights = self._packed_head.data_ptr()
            if parts.head_bias:
                bias = parameters.vector(f"{description.head}.bias")[first:last]
                self._head_bias = torch.nn.functional.pad(bias, (0, -len(bias) % ops.PANEL))
                self._head.bias = self._head_bias.data_ptr()
        if self._shares_head and self._packed_head is not None:
            self._embedding, self._is_packed = self._packed_head.view(self.dtype).view(-1, parts.hidden), True

    def bind_kv(self, pool: KvPool) -> None:
        """Makes the shard use these pages from now on.

        Raises:
            InternalError: the pool was made for other layers or pages.
        """
        own, theirs = [layer.layer_idx for layer in self.kv_layers], [layer.layer_idx for layer in pool.layers]
        if own != theirs or pool.page_size != self._spec.page_size:
            raise InternalError(
                f"a KV pool of layers {theirs}, pages of {pool.page_size}, was given to a shard of layers {own}, pages "
                f"of {self._spec.page_size}"
            )
        if self._pool is None:
            self._engine = ops.StageEngine(self._shape, self._exchange.handle if self._exchange is not None else None)
        self._pool = pool
        for index, weights in self._weights.items():
            weights.set_pages(pool.k(index).data_ptr(), pool.v(index).data_ptr())

    def prepare(self, batch: StepBatch) -> None:
        """Lays out the step's rows and pages for the kernels, before its activation arrives."""
        arrays = lay_out(batch)
        pointers = [entry.buffer_info()[0] for entry in arrays]
        step = ops.Step(len(batch.starts), sum(batch.counts), *pointers, batch.alone)
        step.arrays = arrays
        batch.prepared = step

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Computes one step. Returns hidden states [T, H], or logits [R, V] in fp32 on the last stage.

        With several ranks, hidden states are the same on each. Only rank 0 has the whole logits.

        Raises:
            TransportError: another rank is lost or late.
        """
        if self._pool is None:
            raise InternalError("a step before bind_kv")
        if batch.prepared is None:
            self.prepare(batch)
        assert isinstance(batch.prepared, ops.Step)
        hidden = self._input(batch)
        at = hidden.data_ptr()
        self._engine.begin(batch.prepared)
        for i, weights in enumerate(self._weights.values()):
            if i and self.on_layer is not None:
                self.on_layer()
            self._engine.run(weights.operations, at)
        if not self.is_last:
            return hidden
        rows = batch.wanted_rows().to(torch.int32)
        logits = torch.empty(len(rows), self.vocab_size)
        if len(rows):
            assert self._norm is not None
            self._engine.head(self._norm.operations[0], self._head, at, rows, logits)
            if self._parts.logits_scale != 1.0:
                logits *= self._parts.logits_scale
            if (cap := self._parts.logits_softcap) is not None:
                logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _input(self, batch: StepBatch) -> Tensor:
        """Returns the input [T, H] as a copy: the layers work in place, and a link's buffer is released."""
        given = batch.input_of(self.is_first)
        if self._embedding is None:
            return given.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        if self._is_packed:
            hidden = _rows_of_panels(self._embedding, given)
        else:
            hidden = torch.nn.functional.embedding(given, self._embedding)
        scale = self._parts.embedding_scale
        return hidden if scale == 1.0 else hidden * scale


def _rows_of_panels(packed: Tensor, rows: Tensor) -> Tensor:
    """Gathers rows of packed weights [panels * PANEL, k], whose memory is [panels, groups of 4 bytes, outputs]."""
    words = packed.view(torch.int32)
    return words.view(-1, words.shape[1], ops.PANEL)[rows // ops.PANEL, :, rows % ops.PANEL].view(packed.dtype)


def _copy_rows(source: Tensor, out: Tensor, start: int) -> None:
    out.copy_(source[start : start + len(out)])
