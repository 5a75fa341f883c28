"""The prefill budget follows what steps are measured to cost."""

from __future__ import annotations

import random

from stagemesh.gateway.schedule.budget import BEFORE, SMALLEST, StepCosts


def feed(
    costs: StepCosts, base_ms: float, token_ms: float, *, stage: int = 0, steps: int = 100, noise: float = 0.1
) -> None:
    rng = random.Random(stage)
    for _ in range(steps):
        tokens = rng.choice((1, 8, 40, 64))
        costs.add(stage, tokens, (base_ms + token_ms * tokens) * 1e-3 * rng.uniform(1 - noise, 1 + noise))


def test_a_step_of_prompts_lasts_a_few_times_as_long_as_one_without() -> None:
    costs = StepCosts()
    feed(costs, 4.0, 0.25)
    assert 32 <= costs.prefill_budget() <= 64  # 3 x 4 ms is 48 tokens of 0.25 ms


def test_fast_hardware_takes_large_chunks() -> None:
    costs = StepCosts()
    feed(costs, 10.0, 0.02)
    assert 1000 < costs.prefill_budget() < 2200


def test_the_stage_that_prompts_slow_most_decides() -> None:
    costs = StepCosts()
    feed(costs, 4.0, 0.05, stage=0)
    feed(costs, 4.0, 0.4, stage=1)
    assert costs.prefill_budget() <= 48


def test_it_follows_when_costs_change() -> None:
    costs = StepCosts()
    feed(costs, 4.0, 0.25)
    feed(costs, 4.0, 1.0, steps=1000)
    assert costs.prefill_budget() == SMALLEST


def test_steps_that_were_held_up_do_not_count_for_much() -> None:
    costs = StepCosts()
    feed(costs, 4.0, 0.25)
    calm = costs.prefill_budget()
    costs.add(0, 8, 5.0)
    assert abs(costs.prefill_budget() - calm) <= 32


def test_before_there_is_enough_to_go_by() -> None:
    costs = StepCosts()
    assert costs.prefill_budget() == BEFORE
    for _ in range(100):
        costs.add(0, 8, 0.005)
    assert costs.prefill_budget() == BEFORE, "steps of one size tell nothing of a token's cost"
