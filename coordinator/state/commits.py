"""The commits of hub models that a coordinator took, in a JSON file beside its state.

A branch may move while pipelines run. A coordinator that is started again with the same settings must go on with their
commit, or the model would change by a crash. Another `--revision` is another entry.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from stagemesh.hub.cache import write
from stagemesh.hub.reference import COMMIT, HubModel

FILE = "commits.json"


def taken(state_dir: str | None, model: HubModel) -> HubModel:
    """Returns the model at the commit that was taken for it before, or as it is."""
    commit = _read(state_dir).get(str(model))
    return HubModel(model.repo, commit) if isinstance(commit, str) and COMMIT.fullmatch(commit) else model


def keep(state_dir: str | None, model: HubModel, commit: str) -> None:
    """Notes which commit was taken. Raises ConfigError if that cannot be written."""
    before = _read(state_dir)
    if state_dir is not None and model.commit is None and before.get(str(model)) != commit:
        write(Path(state_dir) / FILE, json.dumps({**before, str(model): commit}).encode())


def _read(state_dir: str | None) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((Path(state_dir) / FILE).read_bytes()) if state_dir is not None else None
        return told if isinstance(told, dict) else {}
    return {}
