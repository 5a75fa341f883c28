"""The only module that uses private names of transformers. Tested with 5.17 and 5.23.

A model is built on the meta device by its own class. transformers' own conversion rules (renames, merged experts) map
checkpoint names to its parameters. Buffers that no checkpoint has (rotary frequencies) are computed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import core_model_loading as loading
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import AttentionInterface, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stagemesh.errors import CheckpointError, UnsupportedModel
from stagemesh.models.support import DECIDING

ATTENTION_NAME = "stagemesh"


def load_config(model_dir: str | Path) -> PretrainedConfig:
    """Loads the checkpoint's config, as an object of its own class.

    Raises:
        CheckpointError: config.json is missing or damaged.
        UnsupportedModel: transformers does not know this model type.
    """
    path = Path(model_dir) / "config.json"
    try:
        raw = json.loads(path.read_bytes())
        model_type = str(raw["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a model config: {error!r}") from error
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModel(f"model type {model_type!r} is not known to the installed transformers: upgrade it")
    raw.pop("quantization_config", None)  # The model is built with plain parameters.
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} does not describe a {model_type} model: {error}") from error
    return config


def deciding(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the values from which `why_not` decides. The class's defaults are among them."""
    return {name: getattr(config, name, None) for name in DECIDING}


def per_layer(config: PretrainedConfig, name: str) -> list[Any]:
    """Returns a setting for each decoder layer. In some architectures, layers have different head counts."""
    try:
        return [getattr(config, name, None)] * config.num_hidden_layers
    except RuntimeError:  # transformers raises this if layers differ.
        return [getattr(config.per_layer_config[index], name, None) for index in range(config.num_hidden_layers)]


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Returns the class of the causal language model that this config describes.

    Raises:
        UnsupportedModel: there is no class for text alone.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"model type {config.model_type!r} has no decoder-only language model in transformers")
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cls: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return cls


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the whole model on the meta device, without memory or initialisation. Embedding and head are not tied."""
    cls = causal_class(config)
    config = deepcopy(config)
    config.tie_word_embeddings = False
    config.use_cache = False
    config._attn_implementation = ATTENTION_NAME
    config.dtype = dtype
    with contextlib.ExitStack() as stack:
        for context in cls.get_init_context(dtype, False, False, False):
            stack.enter_context(context)
        model = cls(config)
    model.train(False)
    return model


def run_experts_one_by_one(model: PreTrainedModel) -> None:
    """Makes experts compute by plain products of any dtype, instead of grouped ones."""
    model.config._experts_implementation = "eager"


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Returns head parameter -> embedding parameter, for pairs that a tied checkpoint stores once."""
    keys = type(model)._tied_weights_keys
    if not isinstance(keys, dict):
        return {}
    return {target: source for target, source in keys.items() if not re.search(r"[\\\[\]*^$(]", target + source)}


@dataclass
class Source:
    """The checkpoint tensors of one parameter (or, with a converter, of several)."""

    targets: list[str]
    transform: Any
    """transformers' WeightConverter, or None for a plain copy."""
    tensors: list[tuple[str, str]] = field(default_factory=list)
    """(checkpoint name, pattern that matched it)."""


def map_checkpoint(model: PreTrainedModel, names: Iterable[str]) -> list[Source]:
    """Returns the sources of each parameter of the whole, unpruned `model`. Leaves out names that map to none."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model)
    renames = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    sources: dict[str, Source] = {}
    for name in sorted(names, key=loading.dot_natural_key):
        key, pattern = loading.rename_source_key(name, renames, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = loading.rename_source_key(name, [], [], prefix, state)
        if key not in state:
            continue
        if pattern is None:
            sources[key] = Source([key], None, [(name, name)])
            continue
        converter = by_pattern[pattern]
        if key not in sources:
            patterns = converter.target_patterns
            targets = [key.replace(patterns[0], other) for other in patterns] if len(patterns) > 1 else [key]
            sources[key] = Source(targets, deepcopy(converter))
        sources[key].tensors.append((name, pattern))
    return list(sources.values())


def experts(source: Source) -> list[tuple[str, ...]] | None:
    """Returns the checkpoint tensors of each expert if the parameter is a stack of experts, else None.

    The tensors of one expert (gate and up) are concatenated along their rows, in the order of this list.

    Raises:
        CheckpointError: an expert lacks a tensor that others have.
    """
    operations = [(type(op), getattr(op, "dim", None)) for op in source.transform.operations]
    stack = [(loading.MergeModulelist, 0), (loading.Concatenate, 1)]
    if len(source.targets) > 1 or operations not in (stack, stack[:1]):
        return None
    by_pattern = [
        [name for name, matched in source.tensors if matched == pattern] for pattern in source.transform.source_patterns
    ]
    if len({len(names) for names in by_pattern}) > 1:
        counts = " and ".join(str(len(names)) for names in by_pattern)
        raise CheckpointError(
            f"cannot make {source.targets[0]!r}: the checkpoint has {counts} of its experts' tensors, such as "
            f"{source.tensors[0][0]!r}: download it again"
        )
    return list(zip(*by_pattern, strict=True))


def convert(source: Source, tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Runs a converter over its checkpoint tensors (name -> tensor). Returns parameter -> tensor.

    Raises:
        CheckpointError: the tensors do not fit together.
    """
    transform = source.transform
    for name, pattern in source.tensors:
        tensor = tensors.pop(name)
        transform.add_tensor(source.targets[0], name, pattern, lambda tensor=tensor: tensor)
        del tensor
    try:
        converted = transform.convert(source.targets[0], model=model, config=model.config)
    except (RuntimeError, ValueError, KeyError) as error:
        names = ", ".join(name for name, _ in source.tensors[:3])
        raise CheckpointError(f"cannot make {source.targets[0]!r} from {names}, ...: {error}") from error
    return {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}


def parameter_dtype(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.dtype]:
    """Returns a function that gives the dtype of a parameter. Some models want parts in fp32."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    patterns = [(loading.build_glob_alternation([glob])[0], kept) for glob, kept in plan.items()]

    def choose(name: str, meta: torch.Tensor) -> torch.dtype:
        for pattern, kept in patterns:
            if pattern.search(name):
                return kept
        return meta.dtype

    return choose


def is_optional(model: PreTrainedModel, name: str) -> bool:
    """Whether a checkpoint of this architecture may lack this tensor."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return any(re.search(pattern, name) for pattern in patterns)


def ignored_names(model: PreTrainedModel) -> str:
    """Returns a pattern of checkpoint names that this architecture does not use, or "" if there are none."""
    return "|".join(f"({pattern})" for pattern in sorted(model._keys_to_ignore_on_load_unexpected or ()))


def set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Sets a loaded parameter or buffer, and marks it as loaded."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        value = nn.Parameter(value, requires_grad=False)
        module._parameters[leaf] = value
    value._is_hf_initialized = True  # type: ignore[attr-defined]


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes the buffers that no checkpoint has (rotary frequencies). They move from the meta device to `device`."""
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device=device)
    model.initialize_weights()  # type: ignore[no-untyped-call]


def register_attention(function: Callable[..., tuple[torch.Tensor, None]]) -> None:
    """Makes every model built here call `function` for attention.

    No mask function is registered. So transformers makes no mask, and does not look at the positions.
    """
    AttentionInterface.register(ATTENTION_NAME, function)


@contextlib.contextmanager
def kept_attention() -> Iterator[None]:
    """Lets other functions be registered inside, and afterwards registers the one from before again."""
    kept = AttentionInterface().get(ATTENTION_NAME)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if kept is not None:
            register_attention(kept)
