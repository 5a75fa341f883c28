"""Streams on disk: what is read back is what was sent, whoever else writes or was killed within a line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from stagemesh.errors import ConfigError, NotFound
from stagemesh.gateway.api.request import Delta, Logged, TokenLogprob
from stagemesh.gateway.api.token_log import LoggedCall, StreamWriter, TokenLog
from stagemesh.gateway.timing import GatewayTiming

IDENT = "cmpl-" + "a" * 32
CALL = LoggedCall(IDENT, "/v1/completions", '{"prompt": "x"}', 7, [3])
Choices = dict[int, list[Logged]]


def tokens(choices: Choices, choice: int = 0) -> list[int]:
    return [token for token, _ in choices.get(choice, [])]


def say(writing: StreamWriter, *ids: int, choice: int = 0) -> None:
    for ident in ids:
        writing.add(choice, Delta(choice, "", [ident]))


@pytest.fixture
def log(tmp_path: Path) -> TokenLog:
    return TokenLog(str(tmp_path), GatewayTiming())


def test_what_was_sent_is_read_back(log: TokenLog) -> None:
    writing = log.begin(CALL)
    say(writing, 1, 2)
    writing.add(1, Delta(1, "", [8, 9], [TokenLogprob(8, -1.5, ((8, -1.5),)), TokenLogprob(9, -2.0)]))
    call, choices, _ = log.resume(IDENT)
    assert call == CALL
    assert tokens(choices) == [1, 2]
    assert choices[1] == [(8, TokenLogprob(8, -1.5, ((8, -1.5),))), (9, TokenLogprob(9, -2.0))]


def test_a_call_of_which_nothing_was_sent_leaves_nothing(log: TokenLog, tmp_path: Path) -> None:
    log.begin(CALL).close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFound, match="no stream"):
        log.resume(IDENT)


def test_two_that_write_the_same_positions(log: TokenLog) -> None:
    """A client goes on elsewhere, and the first gateway has not noticed yet."""
    first = log.begin(CALL)
    say(first, 1, 2, 3)
    _, _, second = log.resume(IDENT)
    second.continue_at([2])
    say(first, 4)
    say(second, 3, 4)
    say(first, 5)
    say(second, 5, 6)
    assert tokens(log.resume(IDENT)[1]) == [1, 2, 3, 4, 5, 6]


def test_after_a_partial_line(log: TokenLog, tmp_path: Path) -> None:
    """Its writer was killed; another one that still writes is ahead."""
    say(log.begin(CALL), 1, 2)
    path = tmp_path / f"{IDENT}.jsonl"
    path.write_bytes(path.read_bytes() + b"[0, 2, [[3, nu")
    _, choices, writing = log.resume(IDENT)
    assert tokens(choices) == [1, 2]
    writing.continue_at([2])
    say(writing, 3, 4)
    assert tokens(log.resume(IDENT)[1]) == [1, 2, 3, 4]


def test_nothing_behind_a_gap_is_of_use(log: TokenLog) -> None:
    writing = log.begin(CALL)
    say(writing, 1, 2)
    writing.continue_at([5])
    say(writing, 6)
    assert tokens(log.resume(IDENT)[1]) == [1, 2]


def test_a_stream_is_kept_for_its_time(tmp_path: Path) -> None:
    log = TokenLog(str(tmp_path), GatewayTiming(stream_kept_s=2.0, stream_sweep_s=0.0))
    say(log.begin(CALL), 1)
    other = LoggedCall("cmpl-" + "b" * 32, CALL.path, CALL.body, CALL.created, CALL.seeds)
    say(log.begin(other), 1)
    long_ago = time.time() - 3.0
    os.utime(tmp_path / f"{IDENT}.jsonl", (long_ago, long_ago))
    log.begin(other)
    with pytest.raises(NotFound, match="over 2 s ago"):
        log.resume(IDENT)
    assert tokens(log.resume(other.id)[1]) == [1]


@pytest.mark.parametrize("ident", ["cmpl-1", "../" + IDENT, "chatcmpl-" + "z" * 32])
def test_names_that_are_none(log: TokenLog, ident: str) -> None:
    with pytest.raises(NotFound):
        log.resume(ident)


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match="--token-log /proc/none"):
        TokenLog("/proc/none", GatewayTiming())
