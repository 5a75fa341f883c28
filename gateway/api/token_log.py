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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError, NotFound

from ..timing import GatewayTiming
from .request import Delta, Logged, TokenLogprob

log = logging.getLogger(__name__)

NAME = re.compile(r"(?:chatcmpl|cmpl)-[0-9a-f]{32}")


@dataclass(frozen=True)
class LoggedCall:
    """The request of a stream."""

    call_id: str
    path: str
    """Path of the endpoint."""
    body: bytes
    created: int
    seeds: tuple[int, ...]
    """One for each prompt."""


@dataclass
class LoggedStream:
    """A call, and its answer as far as it was written."""

    call: LoggedCall
    choices: dict[int, list[Logged]] = field(default_factory=dict)
    """Choice -> its tokens."""


class TokenLog:
    """The files of one folder, which gateways may share."""

    def __init__(self, folder: str, timing: GatewayTiming) -> None:
        """Raises ConfigError where the folder cannot be written."""
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
        """The file of a new call, which is made with its first piece."""
        self._sweep()
        head = {"id": call.call_id, "path": call.path, "body": call.body.decode(), "created": call.created,
                "seeds": call.seeds}  # fmt: skip
        return StreamWriter(self._path(call.call_id), head)

    def resume(self, call_id: str) -> tuple[LoggedStream, StreamWriter]:
        """A call's stream as far as it was written, and its file to append to. Raises NotFound."""
        path = self._path(call_id) if NAME.fullmatch(call_id) else None
        lines: list[Any] = []
        partial = False
        with contextlib.suppress(OSError):
            data = path.read_bytes() if path is not None else b""
            partial = not data.endswith(b"\n")
            for line in data.splitlines():
                with contextlib.suppress(ValueError):  # a partial line: its writer was killed
                    lines.append(json.loads(line))
        if not lines or path is None:
            kept_s = self._timing.stream_kept_s
            raise NotFound(f"no stream {call_id!r} is known here: it never began, or ended over {kept_s:g} s ago")
        head = lines[0]
        call = LoggedCall(head["id"], head["path"], head["body"].encode(), head["created"], tuple(head["seeds"]))
        recorded = LoggedStream(call)
        for choice, start, entries in lines[1:]:
            known = recorded.choices.setdefault(choice, [])
            # Two gateways may have written the same positions: the tokens are the same. After a gap nothing is of use.
            if start <= len(known):
                known += [_entry(raw) for raw in entries[len(known) - start :]]
        return recorded, StreamWriter(path, after_partial_line=partial)

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

    def __init__(self, path: Path, head: object = None, *, after_partial_line: bool = False) -> None:
        """`head`: first line of a file that is not there yet. `after_partial_line`: the file's last line has no end."""
        self._path, self._head = path, head
        self._begin = b"\n" if after_partial_line else b""
        self._fd: int | None = None
        self._lengths: dict[int, int] = {}

    def add(self, choice: int, delta: Delta) -> None:
        """Writes a piece of a choice's answer. Call it before the piece is sent. Raises OSError."""
        start = self._lengths.get(choice, 0)
        self._lengths[choice] = start + len(delta.tokens)
        told: list[object] = [[p.logprob, p.top] for p in delta.logprobs]
        logprobs = told or [None] * len(delta.tokens)
        self._line([choice, start, list(zip(delta.tokens, logprobs, strict=True))])

    def continue_at(self, lengths: Sequence[int]) -> None:
        """Sets the position at which the next piece of each choice begins. Positions may be written twice."""
        self._lengths = dict(enumerate(lengths))

    def _line(self, value: object) -> None:
        lines = json.dumps(value).encode() + b"\n"
        if self._fd is None:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if self._head is not None:
                lines = json.dumps(self._head).encode() + b"\n" + lines
            lines = self._begin + lines
        os.write(self._fd, lines)

    def close(self) -> None:
        """Closes the file."""
        if self._fd is not None:
            os.close(self._fd)


def _entry(raw: Any) -> Logged:
    token, told = raw
    if told is None:
        return token, None
    logprob, top = told
    return token, TokenLogprob(token, logprob, tuple((int(ident), float(value)) for ident, value in top))
