"""Tensor parallelism by the architecture's own plan: the slice of each parameter that a rank holds, and how its modules
combine the parts of all ranks.

The plan maps module names (layer numbers as `*`) to styles. transformers implements the styles with DTensor and a
device mesh. Here a slice is a range of the checkpoint's tensor, and only that range is read. A module's forward gets
the one collective that its style needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.configuration_utils import PretrainedConfig

from stagemesh.errors import ConfigError, UnsupportedModel
from stagemesh.models.support import check_heads

from ..cut import WHOLE, Cut, even_range
from ..spec import ShardSpec
from ..tp import TPGroup
from .hf import per_layer
from .layout import Layout

_NOTHING = frozenset({"local_params", "replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj"})
_GATHER = frozenset({"colwise_gather_output", "colwise_rep"})
_SPLIT_INPUT = frozenset({"rowwise_split_input", "rowwise_rep"})
_REDUCE_OUTPUT = frozenset({"moe_tp_experts", "all_reduce"})
_COLUMNS = _GATHER | {"colwise", "packed_colwise"}
"""Styles whose outputs are cut. `_ROWS` are styles whose inputs are cut, `_WHOLE` styles without a cut."""
_ROWS = _SPLIT_INPUT | {"rowwise", "packed_rowwise"}
_WHOLE = _NOTHING | _REDUCE_OUTPUT | {"moe_identity_expert"}
_KNOWN = _COLUMNS | _ROWS | _WHOLE | {"embedding_rowwise"}
_KV_PROJECTION = re.compile(r"\.(\d+)\..*\b(k_proj|v_proj)$")


class Parallel:
    """The plan of one model on one rank. With one rank it does nothing."""

    def __init__(
        self, model: nn.Module, config: PretrainedConfig, layout: Layout, spec: ShardSpec, group: TPGroup | None
    ) -> None:
        """Raises ConfigError if the TP size does not fit model or `group`, UnsupportedModel for an unknown style."""
        self._model = model
        self._config = config
        self._group = group
        self._spec = spec
        self._plan: dict[str, str] = {}
        if spec.tp_size > 1:
            base_plan = getattr(config, "base_model_tp_plan", None) or {}
            self._plan = {f"{layout.base_prefix}.{key}": style for key, style in base_plan.items()}
            self._plan.update(getattr(type(model), "_tp_plan", None) or {})
            self._check()
            if group is None or group.size != spec.tp_size or group.rank != spec.tp_rank:
                raise ConfigError(f"tp_size {spec.tp_size} needs a TP group of that size at rank {spec.tp_rank}")

    def cut(self, name: str, shape: Sequence[int]) -> Cut:
        """Returns the part of parameter `name` (of this whole shape) that this rank holds."""
        module_name, _, leaf = name.rpartition(".")
        style = self._style(name) or self._style(module_name)
        if style is None or style in _WHOLE:
            return WHOLE
        dims = len(shape)
        if style in _ROWS:
            if leaf == "bias" or dims == 1:
                return WHOLE
            return self._even(shape, dims - 1, packed=style == "packed_rowwise")
        if style == "embedding_rowwise":
            return self._even(shape, 0)
        kv_heads = self._kv_heads(module_name)
        if kv_heads is not None and kv_heads < self._spec.tp_size:
            head = shape[0] // kv_heads
            mine = self._spec.part(kv_heads)[0]
            return Cut(0, ((mine * head, (mine + 1) * head),))
        return self._even(shape, max(0, dims - 2), packed=style == "packed_colwise")

    def install(self) -> None:
        """Adds to the shard's modules the collectives of their styles."""
        if self._group is None:
            return
        for name, module in self._model.named_modules():
            style = self._style(name)
            if style is not None:
                _install(module, style, self._group, is_head="." not in name)

    def _even(self, shape: Sequence[int], dim: int, packed: bool = False) -> Cut:
        if not packed:
            return Cut(dim, (self._spec.part(shape[dim]),))
        half = shape[dim] // 2
        start, stop = self._spec.part(half)
        return Cut(dim, ((start, stop), (half + start, half + stop)))

    def _style(self, name: str) -> str | None:
        return self._plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) if self._plan else None

    def _kv_heads(self, module_name: str) -> int | None:
        found = _KV_PROJECTION.search(module_name)
        kv_heads = per_layer(self._config, "num_key_value_heads")[int(found[1])] if found else None
        return int(kv_heads) if kv_heads else None

    def _check(self) -> None:
        unknown = sorted(set(self._plan.values()) - _KNOWN)
        if unknown:
            raise UnsupportedModel(
                f"{type(self._model).__name__} cannot run tensor-parallel: its plan uses {', '.join(unknown)}; "
                "use tensor parallel size 1"
            )
        if cuts := cut_heads(self._plan):
            heads = per_layer(self._config, "num_attention_heads")
            kv_heads = per_layer(self._config, "num_key_value_heads") if cuts == "kv_heads" else heads
            check_heads({(h, kv or h) for h, kv in zip(heads, kv_heads, strict=True)}, self._spec.tp_size)


def cut_heads(plan: Mapping[str, str]) -> Literal["", "heads", "kv_heads"]:
    """Returns which heads a plan (module -> style) divides among ranks: none, query heads, or query and KV heads."""
    cut = {name.rpartition(".")[2] for name, style in plan.items() if style == "colwise"}
    if not cut & {"q_proj", "q_b_proj", "query_key_value", "kv_b_proj", "qkv_proj"}:
        return ""
    return "kv_heads" if "k_proj" in cut else "heads"


def _install(module: nn.Module, style: str, group: TPGroup, is_head: bool) -> None:
    """Adds the collective of a style to a module. Styles that are not named here need none."""
    if style == "rowwise" or style in _SPLIT_INPUT:
        if isinstance(module, nn.Linear):
            _install_rowwise(module, group, split_input=style in _SPLIT_INPUT)
    elif style in _GATHER:
        _install_gather(module, group, to_first=is_head)
    elif style in _REDUCE_OUTPUT:
        module.register_forward_hook(lambda _module, _args, output: group.all_reduce(output))
    elif style == "moe_identity_expert":
        module.register_forward_hook(lambda _module, _args, output: output / group.size)
    elif style == "embedding_rowwise":
        _install_vocabulary(module, group)


def _install_gather(module: nn.Module, group: TPGroup, to_first: bool) -> None:
    """Gathers the whole output on every rank, or the head's output on the first rank."""
    total = int(module.out_features)  # type: ignore[arg-type]
    gather = group.gather_last_dim_to_first if to_first else group.all_gather_last_dim
    module.register_forward_hook(lambda _module, _args, output: gather(output, total))


def _install_rowwise(module: nn.Linear, group: TPGroup, split_input: bool) -> None:
    """Makes each rank multiply its input columns. The sum over ranks gets the bias once."""
    bias = module.bias
    module.register_parameter("bias", None)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if split_input:
            start, stop = even_range(hidden.shape[-1], group.size, group.rank)
            hidden = hidden[..., start:stop]
        out = group.all_reduce(F.linear(hidden, module.weight))
        return out if bias is None else out + bias

    module.forward = forward  # type: ignore[method-assign, assignment]


def _install_vocabulary(module: nn.Module, group: TPGroup) -> None:
    """Makes each rank look up the ids that it holds. The sum over ranks is the embedding."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert isinstance(module, nn.Embedding)
    start, stop = even_range(module.num_embeddings, group.size, group.rank)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        foreign = (ids < start) | (ids >= stop)
        found = F.embedding((ids - start).masked_fill(foreign, 0), weight)
        return group.all_reduce(found.masked_fill(foreign[..., None], 0))

    module.forward = forward  # type: ignore[method-assign, assignment]
