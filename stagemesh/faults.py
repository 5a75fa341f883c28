"""Fault injection: named points in the code at which tests kill or stop a process.

A test sets STAGEMESH_FAULT_DIR to a folder and creates a file there with a point's name. The first process that reaches
that point removes the file and kills itself, as `kill -9` would. A file that holds the name of another signal, such as
SIGSTOP, makes the process send itself that signal. Without the variable a point costs one comparison.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

FOLDER = os.environ.get("STAGEMESH_FAULT_DIR")


def point(name: str) -> None:
    """Marks a point: "process.what", a name that no other point has."""
    if FOLDER is None:
        return
    path = Path(FOLDER, name)
    try:
        wanted = path.read_text()
        path.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.Signals[wanted or "SIGKILL"])


def poison(tokens: Iterable[int]) -> None:
    """Kills this rank if `tokens` contains the token that the file `rank.poison` names."""
    if FOLDER is not None:
        path = Path(FOLDER, "rank.poison")
        if path.exists() and int(path.read_text()) in tokens:
            os.kill(os.getpid(), signal.SIGKILL)
