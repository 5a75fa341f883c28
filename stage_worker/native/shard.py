"""The fast shard: the same layers as the plain one, through the compiled kernels (stage.cpp).

Weights of linears are packed at load. Queries, keys and values are one linear, gate and up another. Norms, rotary
embedding, cache write, attention and residual sums are fused around them. Pages have the kernels' own layout of keys
and values (attention.h). The plain shard is the reference, and serves models that the kernels do not support.

Shapes: T tokens in the step, R rows that need logits, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from stagemesh.errors import ConfigError, InternalError

from ..kv.pool import KvLayerSpec, KvPool
from ..model.batch import StepBatch, lay_out
from ..model.checkpoint import Checkpoint
from ..model.spec import ShardSpec
from . import ops
from .architecture import Architecture, dtype_of
from .exchange import Exchange
from .weights import EMBEDDING, HEAD, NORM, LayerWeights, Reader, is_tied


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
    _norm: Tensor | None = None
    _packed_head: Tensor | None = None
    _head: ops.Linear
    """The linear of the packed head."""

    def __init__(
        self,
        spec: ShardSpec,
        architecture: Architecture,
        exchange: Exchange | None,
        on_progress: Callable[[int, int], None] | None = None,
        before: NativeShard | None = None,
    ) -> None:
        """Reads the weights that `before`, a shard of the same model, does not have.

        Raises:
            CheckpointError: a tensor is missing, has the wrong shape, or its file is damaged.
            ConfigError: there are several ranks and no exchange.
        """
        a = architecture
        self.num_layers, self.first, self.last = a.num_layers, spec.first, spec.last
        self.is_first, self.is_last = spec.first == 0, spec.last == a.num_layers
        self.hidden_size, self.vocab_size = a.hidden, a.vocab
        checkpoint = Checkpoint(spec.model_dir) if spec.load_format == "auto" else None
        self.dtype = dtype_of(spec.dtype, a)
        self.device = torch.device("cpu")
        if spec.tp_size > 1 and (exchange is None or exchange.size != spec.tp_size):
            raise ConfigError(f"{spec.tp_size} ranks need shared memory to meet in")
        self._spec = spec
        known = before._weights if before is not None else {}
        # One copy serves embedding and head: a token's row is gathered from the panels.
        tied = is_tied(a, checkpoint.names if checkpoint is not None else ())
        shares_head = tied and self.is_first and self.is_last and spec.tp_size == 1
        reader = Reader(
            spec, a, self.dtype, checkpoint, on_progress,
            layers=[index for index in range(spec.first, spec.last) if index not in known],
            embeds=self.is_first and not shares_head and not (before is not None and before.is_first),
            heads=self.is_last and not (before is not None and before.is_last),
        )  # fmt: skip
        self._weights: dict[int, LayerWeights] = {}
        for index in range(spec.first, spec.last):
            self._weights[index] = known[index].again() if index in known else reader.layer(index)
        self._layers = [weights.layer for weights in self._weights.values()]
        self._read_ends(reader, a, before, shares_head)
        tensors = [tensor for weights in self._weights.values() for tensor in weights.tensors]
        tensors += [end for end in (self._embedding, self._norm, self._packed_head) if end is not None]
        # Keyed by address: one copy may serve both embedding and head.
        self.weight_bytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
        self.tensor_bytes_read = checkpoint.tensor_bytes_read if checkpoint is not None else 0
        self.kv_layers = [
            KvLayerSpec(index, a.kv_heads // spec.tp_size, a.head_dim, a.head_dim, a.windows[index])
            for index in range(spec.first, spec.last)
        ]
        self._frequencies = a.inverse_frequencies.contiguous()
        self._idle_cores = array("i", spec.idle_cores)
        self._shape = ops.Shape(
            is_bf16=self.dtype == torch.bfloat16,
            hidden=a.hidden,
            heads=a.heads // spec.tp_size,
            kv_heads=a.kv_heads // spec.tp_size,
            head_dim=a.head_dim,
            intermediate=a.intermediate // spec.tp_size,
            page_size=spec.page_size,
            eps=a.eps,
            scale=a.head_dim**-0.5,
            inverse_frequencies=self._frequencies.data_ptr(),
            threads=max(1, spec.threads),
            tp_rank=spec.tp_rank,
            tp_size=spec.tp_size,
            idle_cores=self._idle_cores.buffer_info()[0],
            idle_count=len(self._idle_cores),
        )
        self._exchange = exchange
        self._pool: KvPool | None = None

    def same_model(self, spec: ShardSpec) -> bool:
        """Whether a shard of `spec` has the same weights in common layers."""
        return dataclasses.replace(spec, first=self.first, last=self.last) == self._spec

    def _read_ends(self, reader: Reader, a: Architecture, before: NativeShard | None, shares_head: bool) -> None:
        """Sets embedding, norm and head. Takes those of `before` if it has them."""
        if self.is_first and not shares_head:
            self._embedding = before._embedding if before is not None and before.is_first else reader.read(EMBEDDING)
        if self.is_last and before is not None and before.is_last:
            self._norm, self._head, self._packed_head = before._norm, before._head, before._packed_head
        elif self.is_last:
            self._norm = reader.read(NORM)
            if reader.tied and self._embedding is not None:
                head = self._embedding[slice(*self._spec.part(a.vocab))]
                n, k = head.shape
                self._packed_head = ops.panels(n, k, self.dtype)
                ops.pack(head, self._packed_head)
            else:
                self._packed_head, n, k = reader.pack(EMBEDDING if reader.tied else HEAD)
            self._head = ops.Linear(self._packed_head.data_ptr(), None, n, k)
        if shares_head and self._packed_head is not None:
            self._embedding = _panels(self._packed_head)

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
        for layer, spec in zip(self._layers, self.kv_layers, strict=True):
            layer.k_pages, layer.v_pages = pool.k(spec.layer_idx).data_ptr(), pool.v(spec.layer_idx).data_ptr()

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
        for i, layer in enumerate(self._layers):
            if i and self.on_layer is not None:
                self.on_layer()
            self._engine.layer(layer, at)
        if not self.is_last:
            return hidden
        rows = batch.wanted_rows().to(torch.int32)
        logits = torch.empty(len(rows), self.vocab_size)
        if len(rows):
            assert self._norm is not None
            self._engine.head(self._norm.data_ptr(), self._head, at, rows, logits)
        return logits

    def _input(self, batch: StepBatch) -> Tensor:
        """Returns the input [T, H] as a copy: the layers work in place, and a link's buffer is released."""
        given = batch.input_of(self.is_first)
        if self._embedding is None:
            return given.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        if self._embedding.dim() == 2:
            return torch.nn.functional.embedding(given, self._embedding)
        return self._embedding[given // ops.PANEL, :, given % ops.PANEL].view(self.dtype)


def _panels(packed: Tensor) -> Tensor:
    """Views packed weights as [panels, groups, outputs] of 4 bytes each."""
    words = packed.view(torch.int32)
    return words.view(-1, words.shape[1], ops.PANEL)
