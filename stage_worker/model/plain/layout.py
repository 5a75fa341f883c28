"""The parts of a model that a stage holds, by the config's `base_model_pp_plan`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from stagemesh.errors import ConfigError, UnsupportedModel


@dataclass(frozen=True)
class Layout:
    """The parts of a causal language model. Names are relative to the base model."""

    base_prefix: str
    """Attribute of the base model in the causal model (`model`, `gpt_neox`)."""
    before: tuple[str, ...]
    """Modules before the layers, on the first stage (embedding)."""
    layers: str
    """Attribute that is the list of decoder layers."""
    after: tuple[str, ...]
    """Modules after the layers, on the last stage (final norm)."""
    num_layers: int


class Elsewhere(nn.Module):
    """A placeholder for a layer or module of another stage. It returns its first argument.

    It keeps the plain attributes of the original, because the model's loop reads some (`attention_type`).
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        own = vars(self)
        for name, value in vars(original).items():
            if not name.startswith("_") and name not in own:
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor | None = None, *args: object, **kwargs: object) -> object:
        """Returns the first argument, whatever its name."""
        return hidden_states if hidden_states is not None else next(iter(kwargs.values()), None)


def find_layout(model: nn.Module, config: object) -> Layout:
    """Reads the plan of a newly built model.

    Raises:
        UnsupportedModel: there is no plan, or it names no list of layers, or weights belong to no stage.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    plan = getattr(config, "base_model_pp_plan", None)
    base = getattr(model, prefix, None)
    if not plan or not isinstance(base, nn.Module):
        raise UnsupportedModel(f"{type(model).__name__} declares no base_model_pp_plan: it cannot be split")
    num_layers = int(getattr(config, "num_hidden_layers", 0))
    names = [name for name in plan if hasattr(base, name)]
    lists = [name for name in names if isinstance(getattr(base, name), nn.ModuleList)]
    if len(lists) != 1 or len(getattr(base, lists[0])) != num_layers:
        raise UnsupportedModel(
            f"{type(model).__name__} does not hold its layers in one list of as many modules: it cannot be split"
        )
    beside = [
        name for name, child in base.named_children() if name not in names and any(True for _ in child.parameters())
    ]
    beside += [name for name, _ in base.named_parameters(recurse=False)]
    if beside:
        raise UnsupportedModel(
            f"{type(model).__name__} has weights beside embedding, layers, norm and head ({', '.join(beside)}): "
            "what they do cannot be told apart by stage"
        )
    where = names.index(lists[0])
    return Layout(prefix, tuple(names[:where]), lists[0], tuple(names[where + 1 :]), num_layers)


def check_range(first: int, last: int, num_layers: int) -> None:
    """Checks a range of layers.

    Raises:
        ConfigError: the range is empty or goes past the model. The error names the range and the layer count.
    """
    if not 0 <= first < last <= num_layers:
        raise ConfigError(
            f"layers [{first}, {last}) are no range of a model with {num_layers} decoder layers: "
            f"give each stage at least one layer of 0 to {num_layers - 1}"
        )


def prune(model: nn.Module, layout: Layout, first: int, last: int) -> None:
    """Replaces everything that stage [first, last) does not hold by `Elsewhere`. Layers keep their global index."""
    base = getattr(model, layout.base_prefix)
    layers = getattr(base, layout.layers)
    for index in range(layout.num_layers):
        if not first <= index < last:
            layers[index] = Elsewhere(layers[index])
    foreign_modules = (() if first == 0 else layout.before) + (() if last == layout.num_layers else layout.after)
    for name in foreign_modules:
        setattr(base, name, Elsewhere(getattr(base, name)))
    if last != layout.num_layers:
        for name, child in list(model.named_children()):
            if name != layout.base_prefix:
                setattr(model, name, Elsewhere(child))
