"""Where the served checkpoint's files are: a folder, or a commit of a model on a hub.

Of a model on a hub the coordinator fetches what describes it, and the headers of its weights. It never has the weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stagemesh.checkpoint import fingerprint
from stagemesh.hub.checkpoint import open_model
from stagemesh.hub.reference import HubModel, parse
from stagemesh.hub.timing import HubTiming
from stagemesh.safetensors_header import StoredTensor
from stagemesh.settings.coordinator import CoordinatorSettings

from .state import commits

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint's description on this machine."""

    folder: Path
    fingerprint: str
    name: str
    model: HubModel | None = None
    """The model on a hub at its commit; None for a folder."""
    headers: Mapping[Path, Mapping[str, StoredTensor]] | None = None
    """Headers of all weight files, if these are not in the folder."""


def find(model: str, revision: str | None, settings: CoordinatorSettings) -> Source:
    """Finds a checkpoint. Takes the commit that a branch names now, or the one that was taken for it before.

    Raises ConfigError, CheckpointError and Unavailable, as `open_model` does.
    """
    hub = parse(model, revision)
    if hub is None:
        path = os.path.abspath(model)
        return Source(Path(path), fingerprint(model, settings.load_format), os.path.basename(path))
    found = open_model(commits.taken(settings.state_dir, hub), HubTiming().scaled(settings.time_scale))
    found.describe()
    headers = found.headers() if settings.load_format == "auto" else None
    commits.keep(settings.state_dir, hub, found.model.revision)
    if hub.commit is None:
        log.info("%s is taken at commit %s", hub, found.model.revision)
    return Source(found.folder, found.model.fingerprint, hub.repo, found.model, headers)
