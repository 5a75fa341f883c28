"""The draft model on the last stage: whatever was guessed, drawn and left out before, it guesses as it would afresh."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from chain import PAGE_SIZE, Chain, Row
from tiny_models import make_checkpoint

from stagemesh.errors import InvalidRequest
from stagemesh.protos.v1 import stage_pb2
from stagemesh.stage_worker.sampling.drafter import Drafted, Drafter
from stagemesh.stage_worker.sampling.guessing import CATCH_UP, StepRow, check_guesses, run_drafter, step_rows

PAGES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("draft"))


class Afresh:
    """The model without any memory."""

    def __init__(self, model: Path) -> None:
        self.chain = Chain(model, (0, 6), num_pages=PAGES)

    def guess(self, tokens: list[int], count: int) -> list[int]:
        out: list[int] = []
        for _ in range(count):
            logits = self.chain.step([Row(tokens + out, 0, list(range(PAGES)), True)])
            out.append(int(logits.argmax()))
        return out


def make_drafter(model: Path) -> Drafter:
    chain = Chain(model, (0, 6), num_pages=PAGES)
    return Drafter(chain.shards[0], chain.pools[0])


def result_of(rows: list[tuple[int, int, list[int]]]) -> stage_pb2.StepResult:
    """(sequence, position, drawn tokens)."""
    result = stage_pb2.StepResult()
    for ident, position, tokens in rows:
        result.sequences.extend([ident] * len(tokens))
        result.positions.extend(range(position, position + len(tokens)))
        result.tokens.extend(tokens)
    return result


@pytest.mark.parametrize("seed", range(8))
def test_guesses_are_those_of_a_fresh_pass(model: Path, seed: int) -> None:
    rng, afresh, drafter = random.Random(seed), Afresh(model), make_drafter(model)
    known = {ident: [rng.randrange(256) for _ in range(rng.randint(1, 40))] for ident in (1, 2)}
    prompts = {ident: len(tokens) for ident, tokens in known.items()}
    # Pages lie apart, in an order of their own; both sequences get new ones as they grow, or a little earlier.
    tables: dict[int, list[int]] = {1: [], 2: []}
    free = rng.sample(range(PAGES), PAGES)
    drafted = {1: Drafted(), 2: Drafted()}
    compared = 0
    for _ in range(25):
        rows, drawn, expected = [], [], []
        for ident in rng.sample((1, 2), rng.randint(1, 2)):
            tokens, state = known[ident], drafted[ident]
            prompt_left = prompts[ident] - (state.done + len(state.behind))
            if prompt_left > 0:
                start = state.done + len(state.behind)
                literal = tokens[start : start + rng.randint(1, prompt_left)]
                ends = start + len(literal) == prompts[ident]
            else:
                start, literal, ends = len(tokens) - 1, tokens[-1:], True
            wanted = rng.choice((0, 1, 4)) if ends else 0
            # What is drawn follows the guesses for a while, as a target that often agrees would.
            new: list[int] = []
            if ends:
                new = state.guessed[: rng.randint(0, 4)] + ([rng.randrange(256)] if rng.random() < 0.8 else [])
                new = new or [rng.randrange(256)]
            room = start + len(literal) + len(new) - 1 + rng.choice((0, 1, 5))
            while len(tables[ident]) * PAGE_SIZE < room:
                tables[ident].append(free.pop())
            rows.append(StepRow(ident, state, tables[ident], start, literal, len(literal) > 1, wanted))
            if ends:
                position = len(tokens)
                tokens += new
                drawn.append((ident, position, new))
            if wanted:
                expected.append((ident, wanted))
        result = result_of(drawn)
        run_drafter(drafter, rows, result)
        assert len(result.guess_counts) == len(expected)
        at = 0
        for (ident, wanted), count in zip(expected, result.guess_counts, strict=True):
            # A token at the end of the pages can be guessed, none behind it.
            room = len(tables[ident]) * PAGE_SIZE - len(known[ident])
            assert count == max(0, min(wanted, room + 1))
            assert list(result.guesses[at : at + count]) == afresh.guess(known[ident], count)
            at += count
            compared += count
    assert compared > 10, f"seed {seed}"


def test_a_prefix_that_is_shared_brings_its_pages_filled(model: Path) -> None:
    afresh, drafter = Afresh(model), make_drafter(model)
    prefix, rest = [(7 * i) % 256 for i in range(2 * PAGE_SIZE)], [9, 8, 7]
    first = StepRow(1, Drafted(), [5, 3], 0, prefix, True, 0)
    run_drafter(drafter, [first], result_of([]))
    second = StepRow(2, Drafted(done=len(prefix)), [5, 3, 6], len(prefix), rest, True, 3)
    result = result_of([(2, len(prefix) + len(rest), [4])])
    run_drafter(drafter, [second], result)
    assert list(result.guesses) == afresh.guess([*prefix, *rest, 4], 3)


def test_pages_that_another_one_filled_are_passed_over(model: Path) -> None:
    """A sequence that is computed again in parts: what lies between them is there, and is not to be written over."""
    afresh, drafter = Afresh(model), make_drafter(model)
    tokens = [(7 * i) % 256 for i in range(3 * PAGE_SIZE)]
    first = StepRow(1, Drafted(), [5, 3, 6], 0, tokens, True, 0)
    run_drafter(drafter, [first], result_of([]))
    second = Drafted()
    # Its first page is its own; the next is the other's.
    run_drafter(drafter, [StepRow(2, second, [7, 3, 2], 0, tokens[:PAGE_SIZE], True, 0)], result_of([]))
    rest = tokens[2 * PAGE_SIZE :]
    result = result_of([(2, len(tokens), [4])])
    run_drafter(drafter, [StepRow(2, second, [7, 3, 2, 1], 2 * PAGE_SIZE, rest, True, 3)], result)
    assert list(result.guesses) == afresh.guess([*tokens, 4], 3)


def test_drawn_tokens_that_pile_up_are_computed_without_being_asked_for(model: Path) -> None:
    drafter, state = make_drafter(model), Drafted()
    run_drafter(drafter, [StepRow(1, state, [0], 0, [3, 5], True, 0)], result_of([(1, 2, [4])]))
    table, most = [0], 0
    for position in range(3, 300):
        table += [position // PAGE_SIZE] if position % PAGE_SIZE == 0 else []
        run_drafter(drafter, [StepRow(1, state, table, position - 1, [], False, 0)], result_of([(1, position, [9])]))
        most = max(most, len(state.behind))
    assert CATCH_UP - 1 <= most <= 2 * CATCH_UP


def test_a_sequence_whose_logits_fail_gets_no_guesses(model: Path) -> None:
    drafter, state = make_drafter(model), Drafted()
    result = result_of([(1, 2, [4])])
    result.failed_sequences.append(1)
    run_drafter(drafter, [StepRow(1, state, [0], 0, [3, 5], True, 2)], result)
    assert list(result.guess_counts) == [0]
    assert not result.guesses


def plan(**settings: object) -> stage_pb2.StepPlan:
    arrays = {"sequences": [1, 2], "starts": [0, 5], "counts": [3, 1], "tokens": [1, 2, 3, 0], "sample_rows": [0, 1]}
    return stage_pb2.StepPlan(step=1, **{**arrays, **settings})  # type: ignore[arg-type]


def test_tokens_that_are_not_known_are_not_learned_from_the_plan() -> None:
    rows = step_rows(plan(ref_rows=[1], ref_steps=[1]), [[0], [1]], lambda ident, start: Drafted(done=start))
    assert [(list(row.tokens), row.is_prompt) for row in rows] == [([1, 2, 3], True), ([], False)]
    rows = step_rows(plan(draft_rows=[0]), [[0], [1]], lambda ident, start: Drafted(done=start))
    assert [(list(row.tokens), row.is_prompt) for row in rows] == [([1], False), ([0], False)]


@pytest.mark.parametrize(
    "settings",
    [
        {"guess_rows": [0], "guess_counts": []},
        {"guess_rows": [0], "guess_counts": [0]},
        {"guess_rows": [0], "guess_counts": [33]},
        {"guess_rows": [0], "guess_counts": [1], "sample_rows": [1]},
    ],
)
def test_a_plan_that_asks_for_what_cannot_be_is_refused(settings: dict[str, list[int]]) -> None:
    with pytest.raises(InvalidRequest, match="guesses"):
        check_guesses(plan(**settings))
    check_guesses(plan(guess_rows=[1], guess_counts=[32]))


def test_notes_of_what_is_known_already_change_nothing() -> None:
    state = Drafted(done=4, behind=[7], guessed=[])
    state.note(2, [1, 1, 7])
    assert (state.done, state.behind) == (4, [7])
    state = Drafted(done=4, guessed=[5, 6])
    state.note(4, [5, 9])
    assert (state.done, state.behind, state.guessed) == (5, [9], [])
