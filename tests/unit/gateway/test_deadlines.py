"""A pipeline whose steps do not come back is given up; not by a gateway that was itself not run."""

from __future__ import annotations

from stagemesh.gateway.drive.deadline import STEP_MARGIN, StepDeadline
from stagemesh.gateway.timing import GatewayTiming

TIMING = GatewayTiming()
EXPECTED_S = 0.001


def deadline(now: float) -> StepDeadline:
    """With a step out, and looked at."""
    made = StepDeadline(TIMING)
    made.out_s(now)
    made.sent(1, now)
    return made


def is_late(watched: StepDeadline, now: float) -> bool:
    return watched.out_s(now) > watched.most_s(EXPECTED_S, measured=True)


def test_a_step_that_does_not_come_back() -> None:
    now = 1000.0
    watched = deadline(now)
    while not is_late(watched, now):
        now += TIMING.look_s
        assert now < 1000 + 2 * TIMING.step_slack_s
    assert now > 1000 + TIMING.step_slack_s


def test_one_that_comes_back_gives_the_others_their_time() -> None:
    now = 1000.0
    watched = deadline(now)
    for step in range(2, 22):
        watched.sent(step, now)
        now += TIMING.look_s
        watched.done(step, now)
        assert not is_late(watched, now)
    watched.done(1, now)
    assert (watched.watches, watched.out_s(now + TIMING.look_s)) == (False, 0.0)


def test_a_gateway_that_was_stopped_blames_nobody() -> None:
    now = 1000.0
    watched = deadline(now)
    for _ in range(5):
        now += 60
        assert not is_late(watched, now)
    assert not is_late(watched, now + TIMING.look_s)


def test_what_was_not_measured_gets_more_time() -> None:
    watched = deadline(1000.0)
    assert watched.most_s(EXPECTED_S, measured=True) == TIMING.step_slack_s + STEP_MARGIN * EXPECTED_S
    assert watched.most_s(None, measured=True) == TIMING.step_timeout_s
    assert watched.most_s(EXPECTED_S, measured=False) == TIMING.recovering_s
    assert watched.most_s(1e6, measured=True) == TIMING.step_timeout_s
