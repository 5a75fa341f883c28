"""Draft rows on a worker: what plans may say of them, and tokens drawn as they would be one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stagemesh.errors import InvalidRequest
from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.stage_worker.rank.engine import draw
from stagemesh.stage_worker.rank.session import Session, SessionContext
from stagemesh.stage_worker.sampling.sampler import SequenceSampler, sample

VOCAB = 24
CPU = torch.device("cpu")
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, log-probabilities": {"logprobs": True, "top_logprobs": 3},
    "drawn": {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 12},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "drawn, penalties": {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.5, "logprobs": True, "top_logprobs": 2},
    "at least 7 tokens": {"min_tokens": 7, "suppressed_ids": [3, 4, 5, 6, 7, 8]},
    "bias": {"bias_ids": [3], "bias_values": [0.5]},
}


def model() -> torch.Tensor:
    """[V, V]: the logits behind each token."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(11)) * 2


def state(number: int, params: dict[str, Any]) -> SequenceSampler:
    message = stage_pb2.OpenSequence(
        sequence=number, sampling=types_pb2.SamplingParams(**params), prompt=[1, 2, 3], prompt_len=3, choice=number
    )
    return SequenceSampler.open(message, VOCAB, CPU)


def one_by_one(count: int) -> dict[str, list[tuple[int, float, list[int]]]]:
    """(token, log-probability, ids of the likeliest) of each position, every sequence alone, without drafts."""
    logits, out = model(), {}
    for number, (name, params) in enumerate(PARAMS.items()):
        sampler, token = state(number, params), 3
        out[name] = []
        for i in range(count):
            drawn = sample(logits[token][None], [sampler], [3 + i])
            token = drawn.tokens[0]
            out[name].append((token, sum(drawn.logprobs), drawn.top_ids))
    return out


def draft_of(true: list[int], step: int) -> list[int]:
    """Guesses of which some hold: all, none, or up to a wrong one in the middle; sometimes none at all."""
    guess = true[: (0, 4, 4, 1, 5)[step % 5]]
    if step % 5 == 2 and len(guess) > 2:
        guess[2] = (guess[2] + 1) % VOCAB
    if step % 5 == 3 and guess:
        guess[0] = (guess[0] + 1) % VOCAB
    return guess


def test_tokens_are_those_that_come_one_at_a_time() -> None:
    """All kinds of sampling as rows of the same steps, with guesses that hold and guesses that do not."""
    expected, logits = one_by_one(60), model()
    samplers = [state(number, params) for number, params in enumerate(PARAMS.values())]
    got: list[list[tuple[int, float, list[int]]]] = [[] for _ in PARAMS]
    accepted = 0
    for step in range(15):
        drafts, lines = [], []
        for number, name in enumerate(PARAMS):
            known = [3, *(token for token, _, _ in got[number])]
            true = [token for token, _, _ in expected[name][len(known) - 1 :]]
            drafts.append(draft_of(true, step + number))
            lines += [known[-1], *drafts[-1]]
        out = sample(logits[lines], samplers, [3 + len(tokens) for tokens in got], drafts)
        at = top = 0
        for number, count in enumerate(out.counts):
            accepted += count - 1
            for _ in range(count):
                ids = out.top_ids[top : top + out.top_counts[at]]
                got[number].append((out.tokens[at], out.logprobs[at], ids))
                top += out.top_counts[at]
                at += 1
        assert at == len(out.tokens)
    assert accepted > 100
    for number, name in enumerate(PARAMS):
        assert len(got[number]) > 20
        for mine, alone in zip(got[number], expected[name], strict=False):
            assert (mine[0], mine[2]) == (alone[0], alone[2]), name
            assert mine[1] == pytest.approx(alone[1], rel=1e-5)


def test_a_number_that_is_not_finite_counts_where_it_is_reached() -> None:
    rows = torch.zeros(3, VOCAB)
    rows[0, 4] = rows[1, 5] = 1.0
    rows[2] = torch.nan
    right = sample(rows, [state(0, {})], [3], [[4, 5]])
    assert (right.tokens[:2], right.counts, right.failed) == ([4, 5], [3], [True])
    wrong = sample(rows, [state(0, {})], [3], [[4, 6]])
    assert (wrong.tokens, wrong.counts, wrong.failed) == ([4, 5], [2], [False])


# -- plans ------------------------------------------------------------------------------------------------------------


def session() -> Session:
    """Of a stage that is all there is: 10 positions of a sequence are computed, in step 1, and one token is drawn."""
    context = SessionContext(
        epoch=1,
        stage=0,
        is_last=True,
        samples=True,
        vocab_size=VOCAB,
        page_size=4,
        pages=tuple(range(8)),
        max_tokens=64,
        device=CPU,
    )
    made = Session(1, 1, context)
    made.open_sequence(stage_pb2.OpenSequence(sequence=1, sampling=types_pb2.SamplingParams(), prompt_len=10))
    made.add_plan(plan(1, 0, [7] * 10, new_pages=[0, 1, 2, 3, 4]))
    return made


def plan(step: int, start: int, tokens: list[int], *, draft: bool = False, **more: Any) -> stage_pb2.StepPlan:
    pages = more.pop("new_pages", [])
    fields: dict[str, Any] = {"sample_rows": [0], "draft_rows": [0] if draft else []} | more
    return stage_pb2.StepPlan(
        step=step,
        epoch=1,
        kind=stage_pb2.STEP_KIND_RUN,
        sequences=[1],
        starts=[start],
        counts=[len(tokens)],
        tokens=tokens,
        new_page_counts=[len(pages)],
        new_pages=pages,
        **fields,
    )


def test_a_draft_row_wants_the_logits_of_all_its_tokens() -> None:
    made = session()
    step = made.add_plan(plan(2, 10, [5, 6, 7, 8], draft=True))
    assert step.batch.logit_rows is not None
    assert step.batch.logit_rows.tolist() == [0, 1, 2, 3]
    (row,) = step.sampled
    assert (row.position, row.draft) == (11, (6, 7, 8))
    assert made.steps[1].batch.logit_rows is not None
    assert made.steps[1].batch.logit_rows.tolist() == [9], "the last one's, of a row without guesses"


@pytest.mark.parametrize("start", [11, 12, 13, 14])
def test_a_sequence_goes_on_where_its_guesses_failed(start: int) -> None:
    made = session()
    made.add_plan(plan(2, 10, [5, 6, 7, 8], draft=True))
    step = made.add_plan(plan(3, start, [9]))
    assert step.batch.starts == [start]
    with pytest.raises(InvalidRequest, match=f"at {start}, but it holds {start + 1} positions"):
        made.add_plan(plan(4, start, [9]))
    made.add_plan(plan(4, start + 1, [9]))


@pytest.mark.parametrize("start", [0, 10, 15])
def test_nothing_else_is_taken_back(start: int) -> None:
    made = session()
    made.add_plan(plan(2, 10, [5, 6, 7, 8], draft=True))
    with pytest.raises(InvalidRequest, match="it holds 14 positions, 11 of them for certain"):
        made.add_plan(plan(3, start, [9]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": [5]},
        {"sample_rows": []},
        {"draft_rows": [1]},
        {"tokens": [5], "ref_rows": [0], "ref_steps": [1]},
    ],
    ids=["no guesses", "not sampled", "no such row", "a token that is not known"],
)
def test_a_draft_row_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    tokens = wrong.pop("tokens", [5, 6])
    with pytest.raises(InvalidRequest, match="cannot be a draft"):
        session().add_plan(plan(2, 10, tokens, **{"draft_rows": [0], **wrong}))


def test_nothing_refers_to_the_result_of_a_draft_row() -> None:
    made = session()
    made.add_plan(plan(2, 10, [5, 6], draft=True))
    with pytest.raises(InvalidRequest, match="refers to sequence 1 in step 2, which has no result"):
        made.add_plan(plan(3, 12, [0], ref_rows=[0], ref_steps=[2]))


def test_tokens_that_are_told_again_while_a_step_waits_are_taken_once() -> None:
    """A rank above 0 looks at its order as long as the step lacks its input or a credit."""
    made = session()
    step = made.add_plan(plan(2, 10, [0], ref_rows=[0], ref_steps=[1]))
    for _ in range(3):
        made.give_tokens(step, [9])
    assert step.batch.token_ids is not None
    assert step.batch.token_ids.tolist() == [9]
    assert made.knows_tokens(step)


def test_a_result_holds_every_token_drawn_and_tells_apart_what_may_be_referred_to() -> None:
    made = session()
    made.open_sequence(stage_pb2.OpenSequence(sequence=2, sampling=types_pb2.SamplingParams(), prompt_len=1))
    both = plan(2, 10, [5, 6, 7, 9], draft=True)
    both.sequences.append(2)
    both.starts.append(0)
    both.counts[:] = [3, 1]
    both.sample_rows.append(1)
    both.new_page_counts.append(1)
    both.new_pages.append(7)
    step = made.add_plan(both)
    assert step.sampled_sequences == [2]
    logits = torch.zeros(4, VOCAB)
    for line, token in enumerate((6, 8, 1, 4)):
        logits[line, token] = 1.0
    result = stage_pb2.StepResult()
    assert draw(step, logits, result) == [4]
    assert list(zip(result.sequences, result.positions, result.tokens, strict=True)) == [
        (1, 11, 6),
        (1, 12, 8),
        (2, 1, 4),
    ]
