"""The prefill budget follows what steps are measured to cost."""

from __future__ import annotations

import random

from stagemesh.gateway.schedule.budget import BEFORE, SMALLEST, DecodeSteps, StepCosts


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


class TestDecodeSteps:
    """Two stages of a core each on one machine, so that a step which runs alone has two."""

    @staticmethod
    def measured(beside: tuple[float, float] | None, alone: tuple[float, float] | None) -> DecodeSteps:
        """(ms of a step, ms of each token) of steps beside others, and of steps alone."""
        steps = DecodeSteps()
        rng = random.Random(1)
        for is_alone, line in ((False, beside), (True, alone)):
            for _ in range(50 if line else 0):
                tokens = rng.choice((1, 4, 8, 40))
                base, each = line or (0.0, 0.0)
                steps.add(tokens, (base + each * tokens) * 1e-3, alone=is_alone)
        return steps

    def best(self, steps: DecodeSteps, rows: int, *, most: int = 2, more_cores: float = 2.0) -> int:
        return steps.best(rows, most, 2, more_cores)

    def test_one_step_where_weights_are_most_of_it(self) -> None:
        """Each of two steps would read all weights for half of the rows."""
        steps = self.measured((6.0, 0.1), (3.5, 0.06))
        assert [self.best(steps, rows) for rows in (2, 8, 32)] == [1, 1, 1]

    def test_spread_where_rows_are_most_of_it(self) -> None:
        """Two cores on one step are not twice as fast, and two steps are."""
        steps = self.measured((1.0, 0.5), (0.9, 0.4))
        assert [self.best(steps, rows) for rows in (8, 32)] == [2, 2]

    def test_what_was_measured_goes_before_what_is_expected_of_cores(self) -> None:
        assert self.best(self.measured((6.0, 0.1), None), 8) == 1
        assert self.best(self.measured((6.0, 0.1), (6.0, 0.1)), 8) == 2
        assert self.best(self.measured(None, (4.0, 0.07)), 8) == 1

    def test_spread_without_cores_to_lend_or_before_anything_is_known(self) -> None:
        steps = self.measured((6.0, 0.1), (3.5, 0.06))
        assert self.best(steps, 8, more_cores=1.0) == 2
        assert self.best(steps, 8, most=1) == 1
        assert self.best(DecodeSteps(), 8) == 2

    def test_other_layers_are_measured_anew(self) -> None:
        steps = self.measured((6.0, 0.1), (3.5, 0.06))
        steps.only_for((6, 12))
        assert self.best(steps, 8) == 2
        for tokens in (1, 8) * 8:
            steps.add(tokens, 6e-3 + 1e-4 * tokens, alone=False)
        steps.only_for((6, 12))
        assert self.best(steps, 8) == 1

    def test_near_the_border_it_stays_as_it_is(self) -> None:
        steps = self.measured((2.0, 0.2), (1.6, 0.128))
        by_rows = {rows: self.best(steps, rows) for rows in range(64, 1, -1)}
        border = max(rows for rows, best in by_rows.items() if best == 1)
        assert 4 < border < 60
        assert self.best(steps, border + 1) == 1, "a little more rows do not turn it back"
        assert self.best(steps, 64) == 2
        assert self.best(steps, border + 1) == 2
