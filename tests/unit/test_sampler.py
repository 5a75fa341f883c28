"""The sampler: truncation, penalties, bias, log-probabilities, noise that depends on (seed, choice, position) alone."""

from __future__ import annotations

import math
from typing import Any

import torch

from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.stage_worker.sampling.sampler import SequenceSampler, sample, uniforms

VOCAB = 16


def state(prompt: tuple[int, ...] = (), log: tuple[int, ...] = (), **params: Any) -> SequenceSampler:
    message = stage_pb2.OpenSequence(sampling=types_pb2.SamplingParams(**params), prompt=prompt, log=log)
    return SequenceSampler.open(message, VOCAB, torch.device("cpu"))


def logits(*values: float) -> torch.Tensor:
    row = torch.full((VOCAB,), -5.0)
    row[: len(values)] = torch.tensor(values)
    return row[None]


def draw(row: torch.Tensor, count: int, **params: Any) -> list[int]:
    return [sample(row, [state(temperature=1.0, seed=9, **params)], [i]).tokens[0] for i in range(count)]


def test_greedy_takes_the_likeliest() -> None:
    assert sample(logits(0, 3, 1), [state()], [4]).tokens == [1]


def test_frequencies_follow_the_distribution() -> None:
    row = torch.log(torch.tensor([[0.5, 0.3, 0.2] + [1e-12] * (VOCAB - 3)]))
    tokens = draw(row, 4000)
    for token, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(tokens.count(token) / 4000 - share) < 0.03


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    row = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1] + [1e-12] * (VOCAB - 4)]))
    assert set(draw(row, 300, top_k=2)) == {0, 1}
    assert set(draw(row, 300, top_p=0.65)) == {0, 1}
    assert set(draw(row, 300, min_p=0.4)) == {0, 1, 2}
    assert set(draw(row, 300, top_p=1e-6)) == {0}


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(16, VOCAB, generator=generator)
    together = sample(rows, [state(temperature=0.8, seed=i, top_p=0.9) for i in range(16)], list(range(16)))
    for i in range(16):
        assert sample(rows[i : i + 1], [state(temperature=0.8, seed=i, top_p=0.9)], [i]).tokens == [together.tokens[i]]


def test_noise_differs_by_seed_choice_and_position() -> None:
    drawn = uniforms([1, 2, 1, 1], [0, 0, 1, 0], [5, 5, 5, 6]).tolist()
    assert len(set(drawn)) == 4
    assert all(0 <= u < 1 for u in drawn)
    assert drawn == uniforms([1, 2, 1, 1], [0, 0, 1, 0], [5, 5, 5, 6]).tolist()


def test_penalties_count_the_log_and_the_prompt() -> None:
    row = logits(2.0, 1.5, 1.0)
    assert sample(row, [state(log=(0,), presence_penalty=1.0)], [1]).tokens == [1]
    assert sample(row, [state(log=(0, 0, 1), frequency_penalty=0.6)], [3]).tokens == [2]
    assert sample(row, [state(prompt=(0,), repetition_penalty=2.0)], [1]).tokens == [1]
    assert sample(row, [state(prompt=(0,))], [1]).tokens == [0], "without a penalty the prompt does not matter"


def test_penalties_remember_what_was_drawn() -> None:
    remembering = state(presence_penalty=2.0)
    row = logits(2.0, 1.5, 1.0)
    assert [sample(row, [remembering], [i]).tokens[0] for i in range(3)] == [0, 1, 2]


def test_an_id_that_the_vocabulary_does_not_have_ends_nothing() -> None:
    """A checkpoint may name such an end-of-sequence id."""
    ending = state(min_tokens=2, suppressed_ids=[0, VOCAB, VOCAB + 900])
    assert sample(logits(3, 2), [ending], [0]).tokens == [1]


def test_min_tokens_and_bias() -> None:
    row = logits(5.0, 1.0, 0.5)
    ending = state(min_tokens=2, suppressed_ids=[0])
    assert [sample(row, [ending], [i]).tokens[0] for i in range(3)] == [1, 1, 0]
    assert sample(row, [state(bias_ids=[2], bias_values=[100.0])], [0]).tokens == [2]


def test_logprobs_are_the_models_own() -> None:
    row = logits(2.0, 1.0)
    out = sample(row, [state(logprobs=True, top_logprobs=2, bias_ids=[1], bias_values=[50.0])], [0])
    whole = torch.log_softmax(row[0], -1)
    assert out.tokens == [1]
    assert math.isclose(out.logprobs[0], float(whole[1]), rel_tol=1e-6)
    assert out.top_ids == [0, 1]
    assert out.top_counts == [2]


def test_a_row_that_is_not_finite_fails_alone() -> None:
    rows = torch.cat([logits(1.0), logits(2.0), logits(3.0)])
    rows[1, 4] = torch.nan
    rows[2, 0] = torch.inf
    out = sample(rows, [state(temperature=0.7, seed=1) for _ in range(3)], [0, 0, 0])
    assert out.failed == [False, True, True]
    masked = logits(1.0)
    masked[0, 5] = -torch.inf
    assert sample(masked, [state()], [0]).failed == [False], "-inf is a masked id"
