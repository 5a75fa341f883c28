from __future__ import annotations

import random
from pathlib import Path

import pytest

from stagemesh.gateway.text.detokenizer import Detokenizer
from stagemesh.gateway.text.stops import StopMatcher
from stagemesh.gateway.text.tokenizer import Tokenizer

TEXTS = [
    "hello world",
    "naïve café",
    "日本語のテキスト、🙂🙃 and more",
    "  leading and   inner spaces ",
    "a b c",
    "👩‍👩‍👧‍👦 family",
    "line\nline\r\n\ttab",
]


@pytest.fixture(params=["byte_level_dir", "sentencepiece_dir"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    folder: Path = request.getfixturevalue(request.param)
    return Tokenizer(folder)


def push(detokenizer: Detokenizer, ids: list[int]) -> tuple[str, str | None, int]:
    """Pushes `ids`, as far as to a stop string: the text, what stopped it, and how many tokens were used."""
    text = ""
    for used, token in enumerate(ids, start=1):
        new, stopped_by = detokenizer.push(token)
        text += new
        if stopped_by is not None:
            return text, stopped_by, used
    return text, None, len(ids)


def whole(detokenizer: Detokenizer, ids: list[int]) -> tuple[str, str | None, int]:
    """The same, with the end of the text behind it."""
    text, stopped_by, used = push(detokenizer, ids)
    return text + ("" if stopped_by else detokenizer.finish()), stopped_by, used


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_join_to_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    prompt, ids = tokenizer.encode("abc"), tokenizer.encode("abc" + text)
    # Behind the prompt, so that a decoder that strips the first space does not strip ours.
    ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else tokenizer.encode(text, add_special_tokens=False)
    expected = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    assert whole(Detokenizer(tokenizer, prompt), ids) == (expected, None, len(ids))


def test_a_piece_never_ends_within_a_character(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"))
    pieces = [detokenizer.push(i)[0] for i in tokenizer.encode("🙂é日", add_special_tokens=False)]
    assert "".join(pieces).strip() == "🙂é日"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_comes_as_a_replacement_at_the_end(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    smile = tokenizer.encode("🙂", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [])
    assert push(detokenizer, [*tokenizer.encode("a", add_special_tokens=False), *smile[:3]])[0] == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("rest", ["rest of the character", "something else"])
def test_a_prompt_that_ends_within_a_character(byte_level_dir: Path, rest: str) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    euro = tokenizer.encode("€", add_special_tokens=False)
    prompt = tokenizer.encode("price: ") + euro[:2]
    after = tokenizer.encode("12", add_special_tokens=False)
    output = [*euro[2:], *after] if rest == "rest of the character" else after
    expected = "€12" if rest == "rest of the character" else "12"
    assert whole(Detokenizer(tokenizer, prompt), output)[0] == expected


def test_a_prompt_that_ends_within_a_byte_fallback_character(sentencepiece_dir: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_dir)
    euro = tokenizer.encode("€", add_special_tokens=False)[1:]
    assert len(euro) == 3
    assert push(Detokenizer(tokenizer, [*tokenizer.encode("a b"), *euro[:1]]), euro[1:])[0] == "€"


def test_a_space_at_the_start_of_the_output_stays(sentencepiece_dir: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_dir)
    ids = tokenizer.encode("a b", add_special_tokens=False)
    assert push(Detokenizer(tokenizer, ids[:1]), ids[1:])[0] == " b"


def test_a_prompt_of_noise_does_not_leak_into_the_output(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    ff = tokenizer.raw.token_to_id("ÿ")  # type: ignore[union-attr]
    ids = tokenizer.encode("hello", add_special_tokens=False)
    for noise in (1, 3, 7, 20):
        assert whole(Detokenizer(tokenizer, [ff] * noise), ids)[0] == "hello"


@pytest.mark.parametrize("seed", range(6))
def test_noise_comes_out_soon(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(0, 400) for _ in range(300)]
    assert whole(Detokenizer(tokenizer, [3, 4]), ids)[1:] == (None, len(ids))
    detokenizer, waits = Detokenizer(tokenizer, []), 0
    for token in [tokenizer.encode("\x80")[-1]] * 200:
        waits = 0 if detokenizer.push(token)[0] else waits + 1
        assert waits <= 40


def test_special_and_unknown_tokens_give_no_text_and_cost_no_time(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    ids = tokenizer.encode("hello", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, ids)
    # 40,000 tokens that give no text: quadratic work would take minutes.
    assert push(detokenizer, [1, 5000] * 20_000) == ("", None, 40_000)
    assert push(detokenizer, ids)[0] == "hello"
    smile = tokenizer.encode("🙂", add_special_tokens=False)
    assert push(Detokenizer(tokenizer, ids), [*smile[:2], *[1] * 50, *smile[2:]])[0] == "🙂"
    shown = Detokenizer(tokenizer, ids, skip_special_tokens=False)
    assert push(shown, [1, *ids])[0] == "</s>hello"


def test_a_checkpoint_without_tokenizer_gives_no_text(tmp_path: Path) -> None:
    detokenizer = Detokenizer(Tokenizer(tmp_path), [1, 2], ("x",))
    assert push(detokenizer, [1, 2, 3]) == ("", None, 3)
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(
    ("text", "stops", "kept", "stopped_by"),
    [
        ("hello world END more", ["END"], "hello world ", "END"),
        ("aaab", ["aab"], "a", "aab"),
        ("abcabd", ["abd"], "abc", "abd"),
        ("one two", ["two", "one"], "", "one"),
        ("xSTOPy", ["STOP", "TOP"], "x", "STOP"),
        ("日本🙂語", ["🙂"], "日本", "🙂"),
        ("a\n\nb", ["\n\n"], "a", "\n\n"),
        ("nothing here EN", ["END"], "nothing here EN", None),
    ],
)
def test_stop_strings(byte_level_dir: Path, text: str, stops: list[str], kept: str, stopped_by: str | None) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    ids = tokenizer.encode(text, add_special_tokens=False)
    got, why, used = whole(Detokenizer(tokenizer, [0], stops), ids)
    assert (got, why) == (kept, stopped_by)
    if stopped_by is not None:
        included = whole(Detokenizer(tokenizer, [0], stops, include_stop=True), ids)
        assert included == (kept + stopped_by, stopped_by, used)
        # Used: exactly the tokens up to the one that completed it.
        assert stopped_by in tokenizer.decode(ids[:used])
        assert stopped_by not in tokenizer.decode(ids[: used - 1])


def test_only_what_could_become_a_stop_string_is_held_back(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    detokenizer = Detokenizer(tokenizer, [0], ["##END"])

    def say(text: str) -> str:
        return push(detokenizer, tokenizer.encode(text, add_special_tokens=False))[0]

    assert say("ab#") == "ab"
    assert say("#") == ""
    assert say("#") == "#"
    assert say("EN") == ""
    assert say("x#") == "##ENx"
    assert detokenizer.finish() == "#"


def test_stop_strings_are_not_looked_for_before_min_tokens(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    ids = tokenizer.encode("XaXbX", add_special_tokens=False)
    assert len(ids) == 5
    assert whole(Detokenizer(tokenizer, [0], ["X"], min_tokens=3), ids) == ("XaXb", "X", 5)


@pytest.mark.parametrize("seed", range(300))
def test_the_matcher_agrees_with_a_search_of_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
    text = "".join(rng.choices("abc", weights=[4, 4, 1], k=rng.randint(0, 30)))
    matcher, got, stopped_by = StopMatcher(stops, False), "", None
    at = 0
    while at < len(text) and stopped_by is None:
        step = rng.randint(1, 6)
        new, stopped_by = matcher.push(text[at : at + step])
        got, at = got + new, at + step
    if stopped_by is None:
        got += matcher.finish()
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        assert (got, stopped_by) == (text, None)
    else:
        end, _, stop = min(ends)
        assert (got, stopped_by) == (text[: end - len(stop)], stop), f"{stops} in {text!r}"
