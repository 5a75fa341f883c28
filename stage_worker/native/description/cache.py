"""Gives the description of a model from a cache, or lets another process make it (process.py).

That takes seconds, as it imports transformers. Ranks that use compiled kernels do not import it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...model.parts.model import ModelDescription, from_json

_MADE_BY = ("model/parts", "model/parts/reading", "model/plain", "native", "native/program", "native/description")
"""What makes descriptions. If its code changes, they are made again."""
TIMEOUT_S = 100.0
"""Longest wait for a description. A forkserver waits, too, and has 120 s for its imports (LaunchTiming.import_s)."""
_LOOK_S = 0.05
"""Interval of checks while waiting. A process that only sleeps would be taken for one that hangs."""
_MOST = 400
"""Largest number of files in the cache: descriptions and their locks."""
_MOST_IN_MEMORY = 8

log = logging.getLogger(__name__)


class NotDescribed(Exception):
    """Why there is no description of a model."""


Answerer = Callable[[str, Sequence[str] | None], str]
"""Describes a folder's model with these tensors. Returns JSON. Raises NotDescribed."""
_answers: dict[tuple[str, bytes, tuple[str, ...] | None], ModelDescription | str] = {}
"""Descriptions, or reasons why there is none, by folder, config and tensors. Forks of this process have them, too."""


def describe(
    model_dir: str | Path,
    names: Sequence[str] | None,
    answerer: Answerer | None = None,
    on_wait: Callable[[], None] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> ModelDescription:
    """Describes the model in this folder.

    Args:
        model_dir: the folder.
        names: of its weights, as if they were not quantized; None if they are not read.
        answerer: what describes it if the cache does not; None for another process.
        on_wait: is called every 50 ms while another process describes it.
        timeout_s: longest wait for other processes, in seconds.

    Raises:
        NotDescribed: it has parts that are not known, or cannot be read, or that takes too long.
    """
    try:
        config = (Path(model_dir) / "config.json").read_bytes()
    except OSError as e:
        raise NotDescribed(f"config.json cannot be read: {e}") from e
    key = str(model_dir), config, tuple(sorted(names)) if names is not None else None
    if key not in _answers:
        waiting = _Waiting(timeout_s, time.monotonic() + timeout_s, on_wait)
        try:
            answer = _answer(*key, answerer or functools.partial(_in_process, waiting=waiting), waiting)
        except NotDescribed as e:
            answer = str(e)  # All ranks of a worker use the same kind of shard, so none of them tries again.
        while len(_answers) >= _MOST_IN_MEMORY:
            del _answers[next(iter(_answers))]
        _answers[key] = answer
    answer = _answers[key]
    if isinstance(answer, str):
        raise NotDescribed(answer)
    return answer


@dataclass(frozen=True)
class _Waiting:
    """A wait for another process, with a deadline."""

    timeout_s: float
    until: float
    on_wait: Callable[[], None] | None

    def look(self) -> None:
        """Is called every `_LOOK_S`. Raises NotDescribed after the deadline."""
        if time.monotonic() > self.until:
            raise NotDescribed(f"its parts were not read in {self.timeout_s:.0f} s")
        if self.on_wait is not None:
            self.on_wait()


def _answer(
    model_dir: str, config: bytes, names: tuple[str, ...] | None, answerer: Answerer, waiting: _Waiting
) -> ModelDescription | str:
    """Returns a description, or the reason why there is none."""
    key = hashlib.sha256(json.dumps([_version(), config.hex(), names]).encode()).hexdigest()
    with contextlib.ExitStack() as locked:
        path = None
        try:
            folder = _cache()
            path = folder / f"{key[:40]}.json"
            if (known := _read(path)) is not None:
                return known
            locked.enter_context(_lock(path.with_suffix(".lock"), waiting))
            if (known := _read(path)) is not None:
                return known
        except OSError as e:
            log.warning("descriptions of models are not kept, and each process makes its own: %s", e)
            path = None
        made = answerer(model_dir, names)
        if path is not None:
            with contextlib.suppress(OSError):  # The next one makes it again.
                _write(path, made)
    found = _read_text(made)
    if found is None:
        raise NotDescribed("its description is damaged")
    return found


def _in_process(model_dir: str, names: Sequence[str] | None, waiting: _Waiting) -> str:
    command = [sys.executable, "-m", f"{__package__}.process", str(os.getpid())]
    # It would fight with the ranks for their cores.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    request: str | None = json.dumps({"model_dir": model_dir, "tensors": names})
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        while True:
            try:
                told, errors = child.communicate(request, timeout=_LOOK_S)
                break
            except subprocess.TimeoutExpired:
                request = None  # Python has taken it.
            try:
                waiting.look()
            except BaseException:
                child.kill()
                raise
    if child.returncode:
        last = errors.strip().splitlines()[-1:] or [f"the process ended with status {child.returncode}"]
        raise NotDescribed(f"its parts cannot be read: {last[0]}")
    return told


@functools.cache
def _version() -> list[str]:
    here = Path(__file__).parents[2]
    files = [file for name in _MADE_BY for kind in ("*.py", "*.so") for file in sorted((here / name).glob(kind))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return [importlib.metadata.version("transformers"), importlib.metadata.version("torch"), digest.hexdigest()]


def _cache() -> Path:
    """Returns the folder of descriptions. Raises OSError if there is none that can be written."""
    home = os.path.expanduser("~")  # Not a path if the user has none.
    base = os.environ.get("XDG_CACHE_HOME") or (f"{home}/.cache" if os.path.isabs(home) else "")
    folders = [Path(base) / "stagemesh" / "models"] if base else []
    folders.append(Path(tempfile.gettempdir()) / f"stagemesh-{os.getuid()}")
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder
    raise PermissionError(f"none of {', '.join(map(str, folders))} is a folder that can be written")


@contextlib.contextmanager
def _lock(path: Path, waiting: _Waiting) -> Iterator[None]:
    """Lets one process of this machine describe a model, while the others wait for its answer.

    Raises OSError, NotDescribed.
    """
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting.look()
                time.sleep(_LOOK_S)
        yield


def _read(path: Path) -> ModelDescription | str | None:
    try:
        return _read_text(path.read_text())
    except (OSError, ValueError):
        return None


def _read_text(text: str) -> ModelDescription | str | None:
    """Returns a description or a reason, or None if the text is neither."""
    try:
        found: Any = from_json(json.loads(text))
    except (ValueError, KeyError, TypeError):
        return None
    if isinstance(found, dict) and isinstance(found.get("reason"), str):
        return str(found["reason"])
    return found if isinstance(found, ModelDescription) else None


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
    for old in sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-_MOST]:
        old.unlink()
