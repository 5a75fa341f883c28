"""Loads a `ModelShard` from a checkpoint: builds on the meta device, prunes, reads only the shard's tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from stagemesh.errors import ConfigError
from stagemesh.models.architectures import ARCHITECTURES
from stagemesh.models.support import refused, why_not
from stagemesh.processes.limits import own_cores

from ...kv.memory import zeros
from ..checkpoint import Checkpoint
from ..cut import WHOLE, Cut
from ..dummy import dummy_tensor
from ..quantized.quantize import is_quantizable, round_trip
from ..quantized.weights import Weights
from ..spec import ShardSpec
from ..tp import TPGroup
from . import hf
from .layout import check_range, find_layout, prune
from .parallel import Parallel
from .shard import ModelShard

log = logging.getLogger(__name__)

_INVENTED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Bound of the fp32 memory for dummy weights in the making, which on a CPU lies beside the shard's."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_shard(
    spec: ShardSpec,
    group: TPGroup | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ModelShard:
    """Builds the shard that `spec` describes and loads its weights. `on_progress(done, total)` counts their bytes.

    With `tp_size` above one, every rank calls this with its own rank and the same `group`.

    Raises:
        UnsupportedModel: the architecture cannot be split, or not this way.
        ConfigError: layer range or TP size do not fit the model.
        CheckpointError: a tensor is missing, has the wrong shape, or its file is damaged.
    """
    config = hf.load_config(spec.model_dir)
    _check_supported(config)
    check_range(spec.first, spec.last, config.num_hidden_layers)
    known = ARCHITECTURES.get(config.model_type)
    if known is None or not known.verified:
        log.warning("model type %r was not tried when this version was made: compare its output", config.model_type)
    device = torch.device(spec.device)
    hf.register_attention(ModelShard.attention)
    weights = Weights(Checkpoint(spec.model_dir)) if spec.load_format == "auto" else None
    if spec.quantization and weights is not None and weights.quantized.quantization is not None:
        raise ConfigError(f"{spec.model_dir} is quantized already, and cannot be by --quantization {spec.quantization}")
    dtype = _choose_dtype(spec, config.dtype, weights)
    model = hf.build_on_meta(config, dtype)
    layout = find_layout(model, config)
    sources = hf.map_checkpoint(model, weights.names) if weights is not None else []
    parallel = Parallel(model, config, layout, spec, group)
    prune(model, layout, spec.first, spec.last)
    if weights is not None and (quantization := weights.quantized.quantization) is not None:
        log.info("weights by %s are dequantized to %s while they are read", quantization.method, dtype)
    filler = _Filler(
        model,
        range(spec.first, spec.last),
        bool(config.tie_word_embeddings),
        parallel,
        dtype,
        device,
        on_progress,
        spec.quantization,
    )
    if weights is not None:
        filler.read(weights, sources)
    else:
        filler.invent(spec.seed)
    parallel.install()
    hf.compute_buffers(model, device)
    read = weights.checkpoint.tensor_bytes_read if weights is not None else 0
    return ModelShard(model, config, layout, spec, dtype, read)


def _check_supported(config: PretrainedConfig) -> None:
    if not getattr(config, "base_model_pp_plan", None):
        raise refused(config.model_type, "its architecture declares no base_model_pp_plan")
    if reason := why_not(hf.deciding(config)):
        raise refused(config.model_type, reason)


def _choose_dtype(spec: ShardSpec, named: object, weights: Weights | None) -> torch.dtype:
    if spec.dtype != "auto":
        return _DTYPES[spec.dtype]
    if isinstance(named, str):
        named = _DTYPES.get(named)
    if named is None and weights is not None:
        named = weights.floats()
    return named if isinstance(named, torch.dtype) and named in _DTYPES.values() else torch.float32


class _Filler:
    """Fills the parameters of a pruned model on the meta device, one after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: range,
        tied: bool,
        parallel: Parallel,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[int, int], None] | None,
        quantization: Literal["", "int8", "fp8", "int4"],
    ) -> None:
        self._model = model
        self._quantization = quantization
        self._layers = layers
        self._parallel = parallel
        self._device = device
        self._on_progress = on_progress
        self._wanted: dict[str, torch.Tensor] = dict(model.state_dict())
        self._tied = hf.tied_weights(model) if tied else {}
        choose = hf.parameter_dtype(model, dtype)
        self._dtypes = {name: choose(name, meta) for name, meta in self._wanted.items()}
        self._done = 0
        self._total = sum(
            math.prod(self._cut(name).shape(meta.shape)) * self._dtypes[name].itemsize
            for name, meta in self._wanted.items()
        )

    def read(self, weights: Weights, sources: list[hf.Source]) -> None:
        """Fills every parameter from the checkpoint.

        Raises:
            CheckpointError: a tensor is missing, would not be used, has the wrong shape, or its file is damaged.
            UnsupportedModel: a tensor is quantized, and the configuration does not say how.
        """
        by_target = {target: source for source in sources for target in source.targets}
        aliases = self._resolve_ties(by_target)
        missing = [name for name in self._wanted if name not in by_target and name not in aliases]
        missing = [name for name in missing if not hf.is_optional(self._model, name)]
        if missing:
            raise weights.checkpoint.lacking(missing)
        own = {id(by_target[name]): by_target[name] for name in self._wanted if name in by_target}
        used = {name for source in own.values() for name, _ in source.tensors}
        known = {name for source in sources for name, _ in source.tensors}
        weights.check_use(used, known, self._layers, hf.ignored_names(self._model))
        for source in sorted(own.values(), key=lambda source: weights.place(source.tensors[0][0])):
            if source.transform is None:
                self._copy(weights, source)
            elif (experts := hf.experts(source)) is not None:
                self._stack(weights, source.targets[0], experts)
            else:
                self._convert(weights, source)
        self._alias(aliases)

    def invent(self, seed: int) -> None:
        """Fills every parameter with seeded random numbers."""
        names = [*self._wanted, *self._tied.values()]
        by_target = {name: hf.Source([name], None, [(name, name)]) for name in names if name not in self._tied}
        aliases = self._resolve_ties(by_target)
        wanted = [name for name in self._wanted if name not in aliases]

        def invented(name: str) -> torch.Tensor:
            tensor = dummy_tensor(by_target[name].tensors[0][0], self._wanted[name].shape, seed)
            return self._cut(name).apply(tensor)

        with ThreadPoolExecutor(min(8, own_cores().count)) as pool:
            for some in self._few_at_a_time(wanted):
                for name, tensor in zip(some, pool.map(invented, some), strict=True):
                    self._put(name, tensor)
        self._alias(aliases)

    def _few_at_a_time(self, names: list[str]) -> Iterator[list[str]]:
        """Yields `names` in parts that fit in `_INVENTED_BYTES` of fp32 memory."""
        some, size = list[str](), 0
        for name in names:
            needed = 4 * math.prod(self._wanted[name].shape)
            if some and size + needed > _INVENTED_BYTES[self._device.type]:
                yield some
                some, size = [], 0
            some.append(name)
            size += needed
        if some:
            yield some

    def _resolve_ties(self, by_target: dict[str, hf.Source]) -> dict[str, str]:
        """Gives embedding and head the same tensor, if the checkpoint stores it once.

        Returns parameter -> other parameter, for pairs that this shard holds with the same cut. They share memory.
        """
        aliases: dict[str, str] = {}
        for head, embedding in self._tied.items():
            for name, other in ((head, embedding), (embedding, head)):
                if name not in self._wanted or name in by_target or other not in by_target:
                    continue
                if other in self._wanted and self._cut(name) == self._cut(other):
                    aliases[name] = other
                else:
                    by_target[name] = hf.Source([name], None, by_target[other].tensors)
        return aliases

    def _copy(self, weights: Weights, source: hf.Source) -> None:
        name, target = source.tensors[0][0], source.targets[0]
        weights.check_shape(name, self._wanted[target].shape)
        out = self._make(target)
        weights.read_into(out, name, self._cut(target))
        self._set(target, out)

    def _stack(self, weights: Weights, target: str, experts: list[tuple[str, ...]]) -> None:
        """Reads the tensors of `experts` to their places in one parameter."""
        cut, whole = self._cut(target), self._wanted[target].shape
        out = self._make(target)
        weights.check_shape(experts[0][0], whole, (len(experts), *whole[1:]))
        for into, names in zip(out, experts, strict=True):
            cuts = [_cut_of_expert(cut, whole, weights.shape(name)) for name in names]
            shapes = [own.shape(weights.shape(name)) for own, name in zip(cuts, names, strict=True)]
            for name, shape in zip(names, shapes, strict=True):
                found = (sum(part[0] for part in shapes), *shape[1:])
                weights.check_shape(name, into.shape, found)
            parts = into.split([shape[0] for shape in shapes])
            for part, name, own in zip(parts, names, cuts, strict=True):
                weights.read_into(part, name, own)
        self._set(target, out)

    def _convert(self, weights: Weights, source: hf.Source) -> None:
        """Fills by transformers' converter, from and into whole tensors. This needs memory for both at once."""
        dtype = self._dtypes.get(source.targets[0], torch.float32)
        tensors = {name: weights.read(name, dtype) for name, _ in source.tensors}
        for name, tensor in hf.convert(source, tensors, self._model).items():
            if name in self._wanted:
                weights.check_shape(source.tensors[0][0], self._wanted[name].shape, tensor.shape)
                self._put(name, self._cut(name).apply(tensor))

    def _make(self, name: str) -> torch.Tensor:
        """Makes the memory of one parameter. On a CPU it comes from the system, and goes back there."""
        shape, dtype = self._cut(name).shape(self._wanted[name].shape), self._dtypes[name]
        if self._device.type == "cpu":
            return zeros(shape, dtype, huge_pages=False)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        out = self._make(name)
        out.copy_(tensor)
        self._set(name, out)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        if self._quantization and is_quantizable(name, tensor.shape):
            module = self._model.get_submodule(name.rpartition(".")[0])
            for matrix in tensor if tensor.dim() == 3 else [tensor]:
                round_trip(matrix.t() if getattr(module, "is_transposed", False) else matrix, self._quantization)
        hf.set_tensor(self._model, name, tensor)
        self._done += tensor.nbytes
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def _alias(self, aliases: dict[str, str]) -> None:
        for name, other in aliases.items():
            shared = self._model.get_parameter(other)
            hf.set_tensor(self._model, name, shared)
            self._done += shared.nbytes

    def _cut(self, name: str) -> Cut:
        return self._parallel.cut(name, self._wanted[name].shape)


def _cut_of_expert(cut: Cut, whole: torch.Size, piece: tuple[int, ...]) -> Cut:
    """Converts a cut of merged experts [E, out, in] to one for the checkpoint's tensor [out, in] of one expert.

    If gate and up are merged along `out`, each of the two tensors gives one of the cut's two ranges.
    """
    if cut.dim is None:
        return WHOLE
    dim = cut.dim - 1
    return Cut(dim, cut.ranges if piece[dim] == whole[cut.dim] else cut.ranges[:1])
