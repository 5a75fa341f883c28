"""Streams on disk, so that a client whose gateway is gone can resume its stream at another one: `--token-log DIR`.

Each call has one file of JSON lines. The first line is the request; each further line is a piece of the answer, written
before that piece is sent. The file is made with the first piece. Tokens that a killed gateway had sampled but not
written are sampled again, and are the same: a token depends on seed, choice and position alone. Nothing is synced to
the disk: a file outlives the process that wrote it, but not a power failure.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError, NotFound

from ..timing import GatewayTiming
from .request import Delta, Logged, TokenLogprob

log = logging.getLogger(__name__)

NAME = re.compile(r"(?:chatcmpl|cmpl)-[0-9a-f]{32}")


@dataclass(frozen=True)
class LoggedCall:
    """The request of a stream, as stored in the first line."""

    id: str
    path: str
    """Path of the endpoint."""
    body: str
    created: int
    seeds: list[int]
    """One seed for each prompt."""


class TokenLog:
    """The files of one folder, which gateways may share."""

    def __init__(self, folder: str, timing: GatewayTiming) -> None:
        """Raises ConfigError if the folder cannot be written."""
        self._folder = Path(folder)
        self._timing = timing
        self._swept_at = 0.0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / f".{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise ConfigError(f"--token-log {folder}: {e}: give a folder that this user can write") from e

    def begin(self, call: LoggedCall) -> StreamWriter:
        """A writer for a new call. It creates the file with the first piece."""
        self._sweep()
        return StreamWriter(self._path(call.id), _line(vars(call)))

    def resume(self, call_id: str) -> tuple[LoggedCall, dict[int, list[Logged]], StreamWriter]:
        """A call, the tokens of its choices as far as they were written, and its file to append to. Raises NotFound."""
        data = b""
        with contextlib.suppress(OSError):
            data = self._path(call_id).read_bytes() if NAME.fullmatch(call_id) else b""
        lines: list[Any] = []
        for line in data.splitlines():
            with contextlib.suppress(ValueError):  # a partial line: its writer was killed
                lines.append(json.loads(line))
        if not lines:
            kept_s = self._timing.stream_kept_s
            raise NotFound(f"no stream {call_id!r} is known here: it never began, or ended over {kept_s:g} s ago")
        choices: dict[int, list[Logged]] = {}
        for choice, start, entries in lines[1:]:
            known = choices.setdefault(choice, [])
            # Two gateways may have written the same positions, with the same tokens. Tokens after a gap are useless.
            if start <= len(known):
                known += [_entry(raw) for raw in entries[len(known) - start :]]
        end = b"" if data.endswith(b"\n") else b"\n"
        return LoggedCall(**lines[0]), choices, StreamWriter(self._path(call_id), end)

    def _path(self, call_id: str) -> Path:
        return self._folder / f"{call_id}.jsonl"

    def _sweep(self) -> None:
        now = time.time()
        if now < self._swept_at + self._timing.stream_sweep_s:
            return
        self._swept_at = now
        for path in self._folder.glob("*.jsonl"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < now - self._timing.stream_kept_s:
                    path.unlink()


class StreamWriter:
    """Appends to the file of one call."""

    def __init__(self, path: Path, before: bytes) -> None:
        """`before`: bytes to write before the first piece."""
        self._path, self._before = path, before
        self._fd: int | None = None
        self._lengths: dict[int, int] = {}

    def add(self, choice: int, delta: Delta) -> None:
        """Writes a piece of a choice's answer. Call it before the piece is sent. Raises OSError."""
        start = self._lengths.get(choice, 0)
        self._lengths[choice] = start + len(delta.tokens)
        told: list[object] = [[p.logprob, p.top] for p in delta.logprobs]
        logprobs = told or [None] * len(delta.tokens)
        line = _line([choice, start, list(zip(delta.tokens, logprobs, strict=True))])
        if self._fd is None:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            line = self._before + line
        os.write(self._fd, line)

    def continue_at(self, lengths: Sequence[int]) -> None:
        """Sets the position at which the next piece of each choice begins. Positions may be written twice."""
        self._lengths = dict(enumerate(lengths))

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _entry(raw: Any) -> Logged:
    token, told = raw
    if told is None:
        return token, None
    logprob, top = told
    return token, TokenLogprob(token, logprob, tuple((int(ident), float(value)) for ident, value in top))
