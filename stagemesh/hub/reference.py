"""What `--model` and `--revision` name: a folder, or a model on a hub. Pure, but for a look whether a folder exists."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from stagemesh.errors import ConfigError

MAIN = "main"
ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""A repository's name: its owner, and its own."""
REVISION = re.compile(r"(?!.*\.\.)[\w][\w./-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubModel:
    """A model on a hub, at one revision."""

    repo: str
    """Its id, such as org/name."""
    revision: str = MAIN
    """A branch, a tag or a commit."""

    @property
    def commit(self) -> str | None:
        """The revision, if it is a commit and so never names other files. None for a branch or a tag."""
        return self.revision if COMMIT.fullmatch(self.revision) else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) that identifies a commit, whatever the name of its repository.

        It stands for `checkpoint.fingerprint` of a folder, for which no machine need have all files.
        """
        return hashlib.sha256(f"hub commit {self.revision}".encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


def parse(model: str, revision: str | None = None) -> HubModel | None:
    """Returns the hub model of `org/name` or `org/name@revision`. None for a folder that exists, or another string.

    Raises ConfigError for a revision that cannot be one, for two revisions, or for one of a folder.
    """
    repo, at, own = model.rpartition("@") if "@" in model else (model, "", "")
    if Path(model).expanduser().exists() or not ID.fullmatch(repo):
        if revision is not None and model:
            raise ConfigError(f"--revision {revision}: it is for a model on a hub (org/name), and {model} is a folder")
        return None
    if at and revision not in (None, own):
        raise ConfigError(f"{model} with --revision {revision} names two revisions: give one")
    wanted = own if at else revision or MAIN
    if not REVISION.fullmatch(wanted):
        raise ConfigError(f"{wanted!r} is not a revision of {repo}: give a branch, a tag or a commit")
    return HubModel(repo, wanted)


def served_name(model: str) -> str:
    """Returns the name under which a model is served by default: its id on the hub, or the name of its folder."""
    hub = parse(model)
    return hub.repo if hub is not None else Path(model).resolve().name
