"""Finds how a mixture of experts chooses experts and weighs them, by trying the known ways on random logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..description import Router
from .explain import same

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, -1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}


def route(router: Router, logits: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the chosen experts [T, used] and their weights [T, used], from logits [T, E]."""
    if router.bias is not None:
        logits = logits + parameters[router.bias]
    scores = SCORES[router.scores](logits)
    choice = logits if router.chosen_by_logits else scores
    if router.choice_bias is not None:
        choice = choice + parameters[router.choice_bias]
    if router.groups > 1:
        groups = choice.reshape(*choice.shape[:-1], router.groups, -1)
        best = groups.topk(router.group_top, dim=-1).values.sum(-1).topk(router.groups_used, dim=-1).indices
        kept = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        choice = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    chosen = choice.topk(router.used, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if router.softmax_of_chosen:
        weights = weights.softmax(-1)
    if router.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights * router.factor


def find_router(
    chosen: Tensor,
    weights: Tensor,
    logits: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    groups: tuple[int, int],
) -> Router | None:
    """Returns the router that chose `chosen` [T, used] with `weights`, from one of `logits`, or None.

    `parameters`: [E] tensors that may be biases. `groups`: the config's number of groups, and how many are used.
    """
    order = chosen.argsort(-1)
    for router in _ways(logits, parameters, chosen.shape[1], groups):
        own_chosen, own_weights = route(router, logits[router.logits], parameters)
        own_order = own_chosen.argsort(-1)
        if not torch.equal(own_chosen.gather(-1, own_order), chosen.gather(-1, order)):
            continue
        found, wanted = own_weights.gather(-1, own_order), weights.gather(-1, order)
        factor = float((wanted / found).mean())
        if same(found * factor, wanted):
            return Router(**{**vars(router), "factor": float(f"{factor:.6g}")})
    return None


def _ways(
    logits: Mapping[str, Tensor], parameters: Mapping[str, Tensor], used: int, groups: tuple[int, int]
) -> Iterator[Router]:
    grouped = [(1, 1, 1)] + [(*groups, top) for top in (1, 2) if groups[0] > 1]
    biases = [None, *parameters]
    for name, bias, scores, choice, (count, kept, top) in itertools.product(logits, biases, SCORES, biases, grouped):
        if logits[name].shape[1] % count or (bias is not None and bias == choice):
            continue
        for by_logits in (False, True):
            for softmax, normalise in ((False, False), (False, True), (True, False)):
                yield Router(name, bias, scores, choice, used, count, kept, top, by_logits, softmax, normalise)
