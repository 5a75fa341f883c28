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
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...model.parts.model import ModelDescription, from_json

_MADE_BY = ("model/parts", "model/parts/reading", "model/plain", "native", "native/program", "native/description")
"""What makes descriptions. If its code changes, they are made again."""
_TIMEOUT_S = 300.0
_MOST = 200
"""Largest number of files in the cache."""


class NotDescribed(Exception):
    """Why there is no description of a model."""


Answerer = Callable[[str, Sequence[str] | None], str]
"""Describes a folder's model with these tensors. Returns JSON."""


def describe(model_dir: str | Path, names: Sequence[str] | None, answerer: Answerer | None = None) -> ModelDescription:
    """Describes the model in this folder.

    Args:
        model_dir: the folder.
        names: of its weights, as if they were not quantized; None if they are not read.
        answerer: what describes it if the cache does not; None for another process.

    Raises:
        NotDescribed: it has parts that are not known, or cannot be read.
    """
    try:
        config = (Path(model_dir) / "config.json").read_bytes()
    except OSError as e:
        raise NotDescribed(f"config.json cannot be read: {e}") from e
    answer = _answer(
        str(model_dir), config, tuple(sorted(names)) if names is not None else None, answerer or _in_process
    )
    if isinstance(answer, str):
        raise NotDescribed(answer)
    return answer


@functools.lru_cache(maxsize=8)
def _answer(model_dir: str, config: bytes, names: tuple[str, ...] | None, answerer: Answerer) -> ModelDescription | str:
    """Returns a description, or the reason why there is none."""
    key = hashlib.sha256(json.dumps([_version(), config.hex(), names]).encode()).hexdigest()
    folder = _cache()
    path = folder / f"{key[:40]}.json"
    with _lock(folder / "lock"):
        if (known := _read(path)) is not None:
            return known
        made = answerer(model_dir, names)
        with contextlib.suppress(OSError):  # The next one makes it again.
            _write(path, made)
    found = _read_text(made)
    if found is None:
        raise NotDescribed("its description is damaged")
    return found


def _in_process(model_dir: str, names: Sequence[str] | None) -> str:
    command = [sys.executable, "-m", f"{__package__}.process"]
    # It would fight with the ranks for their cores.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    request = json.dumps({"model_dir": model_dir, "tensors": names})
    try:
        done = subprocess.run(
            command, input=request, env=env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except subprocess.TimeoutExpired as e:
        raise NotDescribed(f"its parts were not read in {_TIMEOUT_S:.0f} s") from e
    except subprocess.CalledProcessError as e:
        last = str(e.stderr).strip().splitlines()[-1:]
        raise NotDescribed(f"its parts cannot be read: {last[0] if last else e}") from e
    return done.stdout


@functools.cache
def _version() -> list[str]:
    here = Path(__file__).parents[2]
    files = [file for name in _MADE_BY for kind in ("*.py", "*.so") for file in sorted((here / name).glob(kind))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return [importlib.metadata.version("transformers"), importlib.metadata.version("torch"), digest.hexdigest()]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for folder in (Path(base) / "stagemesh" / "models", Path(tempfile.gettempdir()) / f"stagemesh-{os.getuid()}"):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder
    raise NotDescribed("no folder for descriptions of models can be written")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process of this machine describe, while the others wait for its answer."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
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
    for old in sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-_MOST]:
        old.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(name, path)
