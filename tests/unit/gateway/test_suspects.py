"""A request that ends ranks each time it is computed is found, ended, and takes nobody else with it."""

from __future__ import annotations

import random

import pytest
from prefix_world import SIZE, come_back, draw, make

from stagemesh.gateway.drive.ledger import Ledger
from stagemesh.gateway.schedule.pages import Shape
from stagemesh.gateway.schedule.plan import Plan
from stagemesh.gateway.schedule.sequence import Sequence, State
from stagemesh.gateway.schedule.suspects import DEATHS, REPLAY_DEATHS
from stagemesh.protos.v1.stage_pb2 import RunOpened

SHAPE = Shape(tuple(range(60)), SIZE, 2)


class Pipeline:
    """Two stages. The second one's rank dies at a step that computes the poison of a sequence."""

    def __init__(self, poison: dict[Sequence, int], *, in_replays: bool = False) -> None:
        """`poison`: sequences that end a rank when this position of theirs is computed. `in_replays`: also where it is
        merely computed again."""
        self.ledger = Ledger(lambda shape: make(pages=len(shape.pages), steps=2, seqs=6))
        self.poison, self.in_replays = poison, in_replays
        self.out: list[Plan] = []
        self.generation = 1
        self.deaths = 0
        self.ended: list[Sequence] = []
        self.begin()

    def begin(self) -> None:
        self.ledger.begin(
            SHAPE,
            [RunOpened(kv_generation=1, journal=b"\xff" * 16), RunOpened(kv_generation=self.generation, journal=b"")],
        )

    def plan(self) -> bool:
        """Sends the next step, if there is one."""
        plan = self.ledger.scheduler.next_plan()
        if plan is None:
            return False
        suspects = {row.sequence for row in plan.rows if row.sequence.alone and plan.replay is None}
        assert not suspects or (len(plan.rows) == 1 and not self.out), (
            "nothing else is out beside one that is suspected"
        )
        self.ledger.note_sent(plan)
        self.out.append(plan)
        return True

    def run(self) -> bool:
        """Runs the oldest step that is out; False when its rank dies."""
        plan = self.out[0]
        for row in plan.rows:
            at = self.poison.get(row.sequence)
            if at is not None and row.start <= at < row.start + row.count and (plan.replay is None or self.in_replays):
                self.die()
                return False
        self.out.pop(0)
        come_back(self.ledger.scheduler, plan)
        self.ledger.recovered()
        return True

    def die(self) -> None:
        """A rank of the second stage is killed, and another one takes its place."""
        self.deaths += 1
        self.generation += 1
        self.out.clear()
        self.ledger.end()
        for culprit in self.ledger.ranks_died():
            self.ended.append(culprit)
            self.ledger.scheduler.finish(culprit)
        self.begin()


def sequence(rng: random.Random) -> Sequence:
    return Sequence(tuple(rng.randrange(50) for _ in range(rng.randint(1, 12))), 0, rng.randint(2, 20))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("in_replays", [False, True])
def test_only_what_ends_ranks_is_ended(seed: int, in_replays: bool) -> None:
    """Random requests, some of them poisoned, and ranks that die for other reasons."""
    print("seed", seed)
    rng = random.Random(seed)
    sequences = [sequence(rng) for _ in range(12)]
    bad = rng.sample(sequences, rng.randint(0, 3))
    poison = {s: rng.randrange(len(s.prompt) + s.max_tokens - 1) for s in bad}
    pipeline = Pipeline(poison, in_replays=in_replays)
    scheduler = pipeline.ledger.scheduler
    waiting = list(sequences)
    others = 0
    for _ in range(20_000):
        if waiting and rng.random() < 0.1:
            scheduler.add(waiting.pop())
        if rng.random() < 0.01 and pipeline.out and not any(s.alone for s in sequences):
            others += 1
            pipeline.die()
        if rng.random() < 0.5:
            pipeline.plan()
        elif pipeline.out:
            pipeline.run()
        if not waiting and all(s.state is State.FINISHED for s in sequences):
            break
    assert set(pipeline.ended) == set(bad)
    most = REPLAY_DEATHS + 2 if in_replays else DEATHS + 1
    assert pipeline.deaths <= others + most * len(bad) + others * len(bad), "it is not replayed for ever"
    for one in sequences:
        assert one.state is State.FINISHED
        if one not in bad:
            known = list(one.prompt)
            for token in one.log:
                assert token == draw(known)
                known.append(token)
            assert len(one.log) == one.max_tokens, "nobody else's stream ends"
    assert scheduler.pages.num_free == scheduler.pages.num_pages


def test_the_third_death_ends_it_and_the_second_isolates() -> None:
    rng = random.Random(1)
    good, bad = [sequence(rng) for _ in range(3)], Sequence((1, 2, 3), 0, 9)
    pipeline = Pipeline({bad: 4})
    for one in (*good, bad):
        pipeline.ledger.scheduler.add(one)

    def until_death() -> None:
        before = pipeline.deaths
        while pipeline.deaths == before:
            while pipeline.plan():
                pass
            pipeline.run()

    until_death()
    assert not any(s.alone for s in (*good, bad)), "once is nothing"
    until_death()
    assert bad.alone
    assert not pipeline.ended
    until_death()
    assert pipeline.ended == [bad]
    assert pipeline.deaths == 3


def test_deaths_with_progress_between_them_suspect_nobody() -> None:
    """Ranks that are killed again and again: every time something came back meanwhile."""
    sequences = [Sequence((n, 1, 2), 0, 40) for n in range(4)]
    pipeline = Pipeline({})
    for one in sequences:
        pipeline.ledger.scheduler.add(one)
    for _ in range(20):
        before = {one: one.steps_back for one in sequences}
        while any(one.steps_back == before[one] and one.state is not State.FINISHED for one in sequences):
            while pipeline.plan():
                pass
            pipeline.run()
        pipeline.plan()
        if pipeline.out:
            pipeline.die()
        assert not any(one.alone for one in sequences)


def test_a_loss_that_is_no_death_of_ranks_suspects_nobody() -> None:
    pipeline = Pipeline({})
    one = Sequence((1, 2, 3), 0, 9)
    pipeline.ledger.scheduler.add(one)
    for _ in range(5):
        assert pipeline.plan()
        pipeline.out.clear()
        pipeline.ledger.end()
        pipeline.begin()
        assert pipeline.ledger.ranks_died() == [], "too late: another epoch has begun"
    assert not one.alone
