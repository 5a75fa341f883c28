"""How a layer's code is found out from random numbers: what is known is named, what is not is said to be unknown."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stagemesh.stage_worker.model.parts.description import Columns, Gated, Linear, Sum
from stagemesh.stage_worker.model.parts.reading.explain import NotKnown, evaluate, explain
from stagemesh.stage_worker.model.parts.reading.layer import Model, read_layer
from stagemesh.stage_worker.model.parts.reading.record import Given
from stagemesh.stage_worker.model.parts.reading.rotary import find_rotary
from stagemesh.stage_worker.model.parts.reading.router import find_router, route

HIDDEN = 32
MODEL = Model(HIDDEN, (), (1, 1))


class Block(nn.Module):
    """A layer of two linears around a function of what the first one gives."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = HIDDEN) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, width)
        self.down = nn.Linear(HIDDEN, HIDDEN)
        self.between = between

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Adds to its input."""
        return hidden_states + self.down(self.between(self.up(hidden_states)))


def read(between: Callable[[Tensor], Tensor], width: int = HIDDEN) -> object:
    with torch.no_grad():
        layer = read_layer(3, Block(between, width), Given((), {}), MODEL)
    assert layer.output == Sum((("x", 1.0), ("down", 1.0)))
    assert layer.parts[0] == Linear("up", Columns((("x", 0, HIDDEN),)), True)
    down = layer.parts[1]
    assert isinstance(down, Linear)
    return down.source


WHOLE = Columns((("up", 0, HIDDEN),))


@pytest.mark.parametrize(
    ("between", "width", "expected"),
    [
        (lambda x: x, HIDDEN, WHOLE),
        (lambda x: 0.3 * x, HIDDEN, Sum((("up", 0.3),))),
        (lambda x: x.clamp_(-2.5, 2.5), HIDDEN, Columns((("up", 0, HIDDEN),), clip=2.5)),
        (lambda x: x.flip(-1), HIDDEN, Columns(tuple(("up", at, at + 1) for at in reversed(range(HIDDEN))))),
        (torch.relu, HIDDEN, Gated("relu", WHOLE)),
        (
            lambda x: torch.nn.functional.silu(x[..., :HIDDEN]) * x[..., HIDDEN:],
            2 * HIDDEN,
            Gated("silu", WHOLE, Columns((("up", HIDDEN, 2 * HIDDEN),))),
        ),
    ],
)
def test_what_is_between_two_modules_is_named(
    between: Callable[[Tensor], Tensor], width: int, expected: object
) -> None:
    assert read(between, width) == expected


@pytest.mark.parametrize("between", [torch.sin, lambda x: x.cumsum(1), lambda x: x + 1, lambda x: x.roll(1, 1)])
def test_what_is_not_known_is_said_with_its_place(between: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotKnown, match="what goes into down of layer 3 is not known"):
        read(between)


def test_an_expression_computes_what_it_explains() -> None:
    torch.manual_seed(7)
    values = {name: torch.randn(13, 24, dtype=torch.float64) for name in "ab"} | {
        "gate": torch.randn(13, 1, dtype=torch.float64),
        "heads": torch.randn(13, 4, dtype=torch.float64),
    }
    for made in (
        values["a"] - 0.25 * values["b"],
        values["a"] + torch.sigmoid(values["gate"]) * values["b"],
        torch.sigmoid(values["heads"]).repeat_interleave(6, dim=1) * values["b"],
    ):
        source = explain(made, values)
        assert source is not None
        torch.testing.assert_close(evaluate(source, values), made)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("first", [0, 8])
def test_a_rotary_embedding_of_other_angles_than_the_models_own_is_not_taken(interleaved: bool, first: int) -> None:
    torch.manual_seed(8)
    positions = torch.arange(13)
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])
    angles = positions[:, None] * frequencies.double()
    before = torch.randn(13, 2, 16, dtype=torch.float64)
    after, part = before.clone(), before[..., first : first + 8]
    low, high = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, dim=-1)
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]
    turned = low * cosines - high * sines, high * cosines + low * sines
    after[..., first : first + 8] = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    real = angles.cos(), angles.sin()
    found = find_rotary(before, after, real, real, positions, [frequencies])
    assert found is not None
    assert (found.first, found.width, found.interleaved, found.scale) == (first, 8, interleaved, 1.0)
    assert found.frequencies == pytest.approx(frequencies.tolist())
    assert find_rotary(before, after, real, real, positions, [2 * frequencies]) is None


def test_a_router_is_told_from_its_siblings() -> None:
    torch.manual_seed(9)
    logits = {"gate": 2 * torch.randn(400, 16, dtype=torch.float64)}
    biases = {"correction": 0.1 * torch.randn(16, dtype=torch.float64)}
    scores = logits["gate"].sigmoid()
    groups = (scores + biases["correction"]).view(400, 4, 4)
    best = groups.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
    kept = torch.zeros(400, 4, dtype=torch.bool).scatter(1, best, True).repeat_interleave(4, dim=1)
    chosen = (scores + biases["correction"]).masked_fill(~kept, 0.0).topk(3, dim=-1).indices
    weights = scores.gather(1, chosen)
    weights = 2.5 * weights / weights.sum(-1, keepdim=True)
    router = find_router(chosen, weights, logits, biases, (4, 2))
    assert router is not None
    assert (router.scores, router.choice_bias, router.groups, router.group_top) == ("sigmoid", "correction", 4, 2)
    assert (router.normalise, router.factor) == (True, 2.5)
    again = route(router, logits["gate"], biases)
    torch.testing.assert_close(again[1], weights)
    assert find_router(chosen, weights.sqrt(), logits, biases, (4, 2)) is None
