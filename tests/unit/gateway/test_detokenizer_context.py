"""What is streamed after a prompt is what the prompt's text goes on with, whatever the prompt ends with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizer_kinds import KINDS, write

from stagemesh.gateway.text.detokenizer import REPLACEMENT, Detokenizer
from stagemesh.gateway.text.tokenizer import Tokenizer

LETTERS = ["a", "b", "c", " ", " ", "€", "日", "é", "🙂", ".", "\n", "€€€", "  ", "<s>", "</s>", "<|eot|>"]
ROUNDS = 100


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return Tokenizer(write(request.param, tmp_path))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def streamed(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return "".join(detokenizer.push(token)[0] for token in output) + detokenizer.finish()


def by_difference(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> str:
    """The text of both without that of the prompt; a character that the output completes is the output's."""

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=skip)

    both = decode(prompt + output)
    if both.startswith(decode(prompt)):
        return both[len(decode(prompt)) :]
    starts = (decode(prompt[:end]) for end in range(len(prompt) - 1, -1, -1))
    return next(both[len(text) :] for text in starts if both.startswith(text) and not text.endswith(REPLACEMENT))


def test_the_space_behind_bytes_stays(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write("llama2", tmp_path))
    assert streamed(tokenizer, ids(tokenizer, "x€€€"), ids(tokenizer, "a")) == " a"


@pytest.mark.parametrize("seed", range(3))
def test_random_texts_cut_anywhere(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        tokens = ids(tokenizer, "".join(rng.choices(LETTERS, k=rng.randint(1, 25))))
        at, skip = rng.randint(0, len(tokens)), rng.random() < 0.7
        prompt, output = tokens[:at], tokens[at:]
        expected = by_difference(tokenizer, prompt, output, skip)
        assert streamed(tokenizer, prompt, output, skip) == expected, (seed, prompt, output, skip)


@pytest.mark.parametrize("seed", range(3))
def test_an_output_that_does_not_go_on_with_the_prompts_last_character(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(ROUNDS):
        tokens = ids(tokenizer, "".join(rng.choices(LETTERS, k=rng.randint(1, 25))))
        prompt, skip = tokens[: rng.randint(0, len(tokens))], rng.random() < 0.7
        output = ids(tokenizer, rng.choice("abc") + "".join(rng.choices(LETTERS, k=rng.randint(0, 10))))
        expected = by_difference(tokenizer, prompt, output, skip)
        assert streamed(tokenizer, prompt, output, skip) == expected, (seed, prompt, output, skip)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_a_prompt_of_nothing_but_noise(tokenizer: Tokenizer, count: int) -> None:
    noise = [t for t in range(len(tokenizer.special_ids), 300) if tokenizer.token_bytes(t) in (b"\xff", b"\x82")]
    for token in noise:
        for output in (ids(tokenizer, "a b"), ids(tokenizer, "€ a"), [token] * 40):
            expected = by_difference(tokenizer, [token] * count, output, True)
            assert streamed(tokenizer, [token] * count, output) == expected, (token, count, output)


@pytest.mark.parametrize("count", range(28, 40))
def test_a_space_behind_noise_stays(tokenizer: Tokenizer, count: int) -> None:
    for token in (t for t in range(len(tokenizer.special_ids), 300) if tokenizer.token_bytes(t) == b"\xff"):
        output = [token] * count + ids(tokenizer, "a b")
        assert streamed(tokenizer, [], output) == tokenizer.decode(output)


def test_noise_behind_a_prompt_that_ends_within_a_character(tokenizer: Tokenizer) -> None:
    prompt = ids(tokenizer, "b€€€")[:-1]
    noise = [t for t in range(len(tokenizer.special_ids), 300) if tokenizer.token_bytes(t) in (b"\xe2", b"\xff")]
    for token in noise:
        for count in (1, 3, 33, 70):
            expected = by_difference(tokenizer, prompt, [token] * count, True)
            assert streamed(tokenizer, prompt, [token] * count) == expected, (token, count)


def test_special_tokens_at_the_prompts_end_hide_no_text(tokenizer: Tokenizer) -> None:
    for prompt in ("a<s>", "a" + "<s></s><|eot|>" * 10, "€" + "<|eot|>" * 9, "<s>" * 12):
        tokens, output = ids(tokenizer, prompt), ids(tokenizer, "a b")
        for skip in (True, False):
            expected = by_difference(tokenizer, tokens, output, skip)
            assert streamed(tokenizer, tokens, output, skip) == expected, prompt
