"""Settings and checkpoint -> Target, checked before anything starts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os

from stagemesh.checkpoint import inspect, read_config
from stagemesh.errors import ConfigError
from stagemesh.generation import eos_token_ids, generation_config
from stagemesh.models.size import CheckpointInfo
from stagemesh.models.support import PLUGINS, check_supported, heads_to_divide
from stagemesh.planning.cost import CostModel
from stagemesh.planning.limits import default_steps, run_limits
from stagemesh.planning.partition import check_counts
from stagemesh.protos.v1 import types_pb2
from stagemesh.settings.coordinator import CoordinatorSettings

from .planning.target import Target
from .source import Source, find


def build(settings: CoordinatorSettings) -> Target:
    """Reads the checkpoint and checks the settings against it.

    Raises ConfigError and CheckpointError; Unavailable if a hub that should have the checkpoint does not answer.

    What cannot be served is refused here, before a worker loads anything.
    """
    source = find(settings.model, settings.revision, settings)
    info = _inspect(source, settings.load_format)
    # The gateway uses them. They are refused here, before workers load weights.
    generation_config(source.folder)
    eos_token_ids(source.folder)
    stages = settings.pipeline_parallel_size
    check_counts(info.num_layers, stages, settings.layer_partition)
    dtype = info.dtype if settings.dtype == "auto" else settings.dtype
    limits = run_limits(settings, info, gateways=settings.gateways)
    limits.steps_in_flight = settings.steps_in_flight or default_steps(info, limits, dtype, stages)
    model = model_ref(source, settings, info, dtype)
    model.name = settings.name
    draft = _add_draft(settings, info, model, limits.max_model_len)
    # The digest must equal that of earlier releases, so that an upgraded coordinator resumes its pipelines.
    bounds = tuple(getattr(limits, field.name) for field in limits.DESCRIPTOR.fields if field.name != "pipelines")
    terms = hashlib.sha256(model.SerializeToString(deterministic=True) + repr(bounds).encode())
    terms.update(repr((stages, settings.layer_partition, settings.transport)).encode())
    return Target(
        cost=CostModel(info, limits, dtype, draft),
        num_stages=stages,
        model=model,
        layer_partition=tuple(settings.layer_partition) if settings.layer_partition else None,
        transport=settings.transport,
        terms=terms.hexdigest(),
        takeover_s=settings.takeover_after,
        rebalance=settings.rebalance == "auto",
        heads=heads_to_divide(read_config(source.folder)),
    )


def _inspect(source: Source, load_format: str) -> CheckpointInfo:
    """Describes a checkpoint. Raises CheckpointError, and UnsupportedModel if its model cannot be served."""
    installed = importlib.metadata.version("transformers")
    check_supported(read_config(source.folder), installed=installed, plugins=bool(os.environ.get(PLUGINS)))
    return inspect(source.folder, load_format, source.headers)


def model_ref(source: Source, settings: CoordinatorSettings, info: CheckpointInfo, dtype: str) -> types_pb2.ModelRef:
    """The message that tells workers of a checkpoint."""
    hub = source.model
    return types_pb2.ModelRef(
        name=source.name,
        path=str(source.folder) if hub is None else "",
        repo=hub.repo if hub is not None else "",
        commit=hub.revision if hub is not None else "",
        fingerprint=source.fingerprint,
        num_layers=info.num_layers,
        hidden_size=info.hidden_size,
        dtype=dtype,
        load_format=settings.load_format,
        seed=settings.seed,
        deterministic=settings.deterministic,
        quantization=_quantization(source.name, settings, info),
    )


def _quantization(name: str, settings: CoordinatorSettings, info: CheckpointInfo) -> str:
    if settings.quantization and info.quantization:
        raise ConfigError(
            f"--quantization {settings.quantization}: the weights of {name} are quantized already "
            f"({info.quantization}); leave it out"
        )
    return settings.quantization or ""


def _add_draft(
    settings: CoordinatorSettings, info: CheckpointInfo, model: types_pb2.ModelRef, max_model_len: int
) -> CheckpointInfo | None:
    """Adds the draft model that the settings name to `model`, whose dtype it uses. Returns its checkpoint."""
    config = settings.speculative_config
    if config is None or config.model is None:
        return None
    source = find(config.model, None, settings)
    draft = _inspect(source, settings.load_format)
    if draft.vocab_size != info.vocab_size:
        raise ConfigError(
            f"the draft model {config.model} has a vocabulary of {draft.vocab_size}, the model has {info.vocab_size}: "
            "take a draft model with the same tokenizer"
        )
    if draft.max_position_embeddings < max_model_len:
        raise ConfigError(
            f"the draft model {config.model} was made for {draft.max_position_embeddings} positions, and "
            f"--max-model-len is {max_model_len}: lower it, or take another draft model"
        )
    model.draft.num_tokens = config.num_speculative_tokens
    model.draft.model.CopyFrom(model_ref(source, settings, draft, model.dtype))
    return draft
