"""A model shard: transformers' own forward over the shard's layers, with attention over pages.

The model's loop runs unchanged. Modules of other stages return their input. One hook gives the received activation to
the shard's first layer, and another takes the output of its last layer. All tokens of a step are one packed row
`[1, T]` with explicit positions.

Shapes: T tokens in the step, R rows that need logits, H hidden size, V vocabulary size, N heads, K KV heads, D head
size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from stagemesh.errors import InternalError, UnsupportedModel

from ...attention.backend import PagedAttention
from ...attention.base import AttentionKind, AttentionMetadata
from ...attention.tables import DecodeTables
from ...kv.pool import KvLayerSpec, KvPool
from ..batch import StepBatch
from ..spec import ShardSpec
from .layout import Layout


class ModelShard:
    """Layers [first, last) of one model on one rank. Made by `load_shard`."""

    on_layer: Callable[[], None] | None = None
    """Callback after attention and after every layer, in which the caller can drive its transports."""
    cores = (1, 1)
    kv_layout = "heads, positions, size"
    """Name of the layout within a page; see `Shard`."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: PretrainedConfig,
        layout: Layout,
        spec: ShardSpec,
        dtype: torch.dtype,
        tensor_bytes_read: int,
    ) -> None:
        """Takes a model with loaded parameters. Runs it once to learn the KV shapes of its attention.

        Raises:
            UnsupportedModel: a layer does not attend exactly once through the attention function.
        """
        self.num_layers = layout.num_layers
        self.first = spec.first
        self.last = spec.last
        self.is_first = spec.first == 0
        self.is_last = spec.last == layout.num_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.dtype = dtype
        self.device = torch.device(spec.device)
        self.tensor_bytes_read = tensor_bytes_read
        self.weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        self.model = model
        """transformers' model without the modules of other stages."""
        self.attention_backend = PagedAttention(self.device)
        self._base: nn.Module = getattr(model, layout.base_prefix)
        self._one_by_one = spec.deterministic
        """Whether tokens are computed one by one. Matrix products sum in another order for another number of rows, so a
        token has the same bits only by itself."""
        self._pool: KvPool | None = None
        self._rows: AttentionMetadata | DecodeTables | None = None
        self._hidden_in: Tensor | None = None
        self._hidden_out: Tensor | None = None
        self._probed: list[KvLayerSpec] | None = None
        """KV shapes that the first forward finds; None after it."""
        self._hook(getattr(self._base, layout.layers))
        self._kinds: set[tuple[int | None, int]] = set()
        self.kv_layers = self._probe_attention()
        self._kinds = {(layer.sliding_window, layer.num_kv_heads) for layer in self.kv_layers}

    def bind_kv(self, pool: KvPool) -> None:
        """Makes the shard use these pages from now on.

        Raises:
            InternalError: the pool was made for other layers.
        """
        own, theirs = [layer.layer_idx for layer in self.kv_layers], [layer.layer_idx for layer in pool.layers]
        if own != theirs:
            raise InternalError(f"a KV pool of layers {theirs} was given to a shard of layers {own}")
        self._pool = pool

    def prepare(self, batch: StepBatch) -> None:
        """Makes every index that this shard's layers need, before the step's activation arrives."""
        if self._one_by_one and sum(batch.counts) > 1:
            return  # Each token is prepared when it is computed.
        metadata = AttentionMetadata(batch.starts, batch.counts, batch.tables, batch.page_size, self.device)
        metadata.prepare(self._kinds)
        batch.prepared = metadata

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Computes one step. Returns hidden states [T, H], or logits [R, V] in fp32 on the last stage.

        With several ranks, hidden states are the same on each. Only rank 0 has the whole logits.
        """
        if self._one_by_one and sum(batch.counts) > 1:
            return torch.cat([self.forward(one) for one in batch.one_by_one()])
        if batch.prepared is None:
            self.prepare(batch)
        assert isinstance(batch.prepared, AttentionMetadata | DecodeTables)
        self._rows = batch.prepared
        try:
            return self._run(batch, batch.prepared.positions)
        finally:
            self._rows = self._hidden_in = self._hidden_out = None

    def _run(self, batch: StepBatch, positions: Tensor) -> Tensor:
        given = batch.input_of(self.is_first)[None]
        inputs: dict[str, Any] = {"position_ids": positions[None], "use_cache": False}
        inputs["input_ids" if self.is_first else "inputs_embeds"] = self._hidden_in = given
        if self.is_last:
            logits: Tensor = self.model(**inputs, logits_to_keep=batch.wanted_rows()).logits
            return logits[0].float()
        self._base(**inputs)
        if self._hidden_out is None:
            raise InternalError("the model's forward did not reach its last layer here")
        return self._hidden_out[0]

    def _hook(self, layers: nn.ModuleList) -> None:
        own = [layers[index] for index in range(self.first, self.last)]
        if not self.is_first:
            own[0].register_forward_pre_hook(self._put_hidden, with_kwargs=True)
        for layer in own:
            layer.register_forward_hook(self._after_layer)
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    object.__setattr__(module, "stagemesh_shard", self)
        if not self.is_last:
            own[-1].register_forward_hook(self._take_hidden)

    def _put_hidden(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._hidden_in, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._hidden_in}

    def _take_hidden(self, _layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._hidden_out = output[0] if isinstance(output, tuple) else output

    def _after_layer(self, _layer: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if self.on_layer is not None:
            self.on_layer()

    @staticmethod
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention for transformers: `query` [1, N, T, D], `key` and `value` [1, K, T, D] -> [1, T, N, Dv]."""
        if attention_mask is not None:
            raise UnsupportedModel(f"{type(module).__name__} makes an attention mask of its own, for dense keys only")
        if is_causal is False or getattr(module, "is_causal", True) is False:
            raise UnsupportedModel(f"{type(module).__name__} looks ahead: only causal attention can be served")
        shard: ModelShard = module.stagemesh_shard  # type: ignore[assignment]
        layer_idx: int = module.layer_idx  # type: ignore[assignment]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        kind = AttentionKind(scaling, sliding_window, softcap, s_aux)
        return shard._attend(layer_idx, query, key, value, kind), None

    def _attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind) -> Tensor:
        if self._probed is not None:
            spec = KvLayerSpec(layer_idx, key.shape[1], key.shape[3], value.shape[3], kind.sliding_window)
            self._probed.append(spec)
            return value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], dim=2)
        if self._pool is None or self._rows is None:
            raise InternalError("attention before bind_kv, or outside of a step")
        out = self.attention_backend.attend(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self._pool.k(layer_idx),
            self._pool.v(layer_idx),
            self._rows,
            kind,
        )
        if self.on_layer is not None:
            self.on_layer()
        return out[None]

    def _probe_attention(self) -> list[KvLayerSpec]:
        """Runs one token through the layers, with attention that only records its input shapes."""
        layers = self._probed = list[KvLayerSpec]()
        token = torch.zeros(1, dtype=torch.int64, device=self.device)
        hidden = torch.zeros(1, self.hidden_size, dtype=self.dtype, device=self.device)
        self.forward(StepBatch([0], [1], [[0]], 1, token_ids=token, hidden=hidden, logit_rows=token))
        self._probed = None
        if [layer.layer_idx for layer in layers] != list(range(self.first, self.last)):
            raise UnsupportedModel(
                f"{type(self.model).__name__} cannot be served: its layers {self.first} to {self.last - 1} called "
                f"attention for layers {[layer.layer_idx for layer in layers]}; each must, once"
            )
        return layers
