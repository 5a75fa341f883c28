"""A hub model's files at one commit: which a process needs, and that they are in the cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stagemesh.checkpoint import INDEX, SINGLE, listed_weights
from stagemesh.errors import CheckpointError, Unavailable
from stagemesh.safetensors_header import StoredTensor, parse_header, read_header

from . import needs
from .cache import RemoteFile, Snapshot, cache_dir, cached_commit, is_offline, keep_commit, missing
from .client import HubClient
from .download import Tell, fetch
from .reference import HubModel
from .timing import HubTiming

HEADERS_AT_ONCE = 8
log = logging.getLogger(__name__)


class HubCheckpoint:
    """Files of one commit. `model` names the commit, `folder` is a checkpoint's folder with what was fetched."""

    def __init__(
        self, snapshot: Snapshot, files: Mapping[str, RemoteFile], timing: HubTiming, *, is_listed: bool
    ) -> None:
        """`files`: files of the commit, by name. `is_listed`: the hub listed them, so there are no others."""
        self.model, self.folder = snapshot.model, snapshot.folder
        self._snapshot, self._files, self._timing = snapshot, files, timing
        self.is_listed = is_listed

    def describe(self) -> Path:
        """Fetches the configurations and the index. Returns the folder. Raises as `fetch` does."""
        self._get(needs.description(self._files))
        return self.folder

    def fetch_text(self) -> Path:
        """Fetches what the gateway reads. Returns the folder. Raises as `fetch` does."""
        self._get([*needs.description(self._files), *needs.text(self._files)])
        return self.folder

    def fetch_layers(self, layers: tuple[int, int], num_layers: int, tell: Tell) -> int:
        """Fetches the files that hold the tensors of the layers [first, last). Returns the bytes that this brought.

        Raises as `fetch` does. `describe` must have been called.
        """
        return self._get(self.layer_files(layers, num_layers), tell)

    def layer_files(self, layers: tuple[int, int], num_layers: int) -> list[str]:
        """Returns the names of these files. Raises CheckpointError."""
        tensors = self._tensors()
        return [SINGLE] if tensors is None else needs.of_layers(tensors, layers, num_layers)

    def size(self, names: Iterable[str]) -> int:
        """Returns the bytes of these files."""
        return sum(self._files[name].size for name in names)

    def has(self, names: Iterable[str]) -> bool:
        """Whether these files are in the cache."""
        return all(self._snapshot.has(name, self._files.get(name)) for name in names)

    def description_files(self) -> list[str]:
        """Returns the names of the files that `describe` fetches."""
        return needs.description(self._files)

    def headers(self) -> dict[Path, dict[str, StoredTensor]]:
        """Reads the headers of all weight files, for which no file is fetched. Raises as `fetch` does."""
        tensors = self._tensors()
        names = sorted({SINGLE} if tensors is None else set(tensors.values()))
        with ThreadPoolExecutor(HEADERS_AT_ONCE, "headers") as pool:
            return dict(zip((self.folder / name for name in names), pool.map(self._header, names), strict=True))

    def _header(self, name: str) -> dict[str, StoredTensor]:
        file, snapshot = self._files[name], self._snapshot
        if snapshot.has(name, file):
            return read_header(self.folder / name)
        raw = snapshot.header(name)
        if raw is None:
            if is_offline():
                raise missing(self.model, name)
            client = HubClient(self.model, self._timing)
            raw = client.patiently(lambda: client.header(name, file.size))
            snapshot.keep_header(name, raw)
        return parse_header(raw, file.size, f"{self.model}/{name}")

    def _tensors(self) -> dict[str, str] | None:
        """Returns the tensors of the index, each with its file; None without an index. Raises CheckpointError."""
        index = None
        if INDEX in self._files:
            try:
                index = json.loads((self.folder / INDEX).read_bytes())
            except ValueError as e:
                raise CheckpointError(f"{self.model}/{INDEX}: not valid JSON ({e}); tell its authors") from e
        advice = "choose another --revision, or serve a folder with the files that you mean"
        tensors = listed_weights(self._files, index, self.model, advice)
        if tensors is not None and (lacking := sorted(set(tensors.values()) - self._files.keys())):
            raise self._lacks(lacking[0])
        return tensors

    def _lacks(self, name: str) -> CheckpointError:
        if not self.is_listed:
            return missing(self.model, name)
        return CheckpointError(f"{self.model} has no file {name}: choose another --revision, or tell its authors")

    def _get(self, names: Iterable[str], tell: Tell = lambda here, total: None) -> int:
        wanted = {}
        for name in names:
            if name not in self._files:
                raise self._lacks(name)
            if not self._snapshot.has(name, self._files[name]):
                if is_offline():
                    raise missing(self.model, name)
                wanted[name] = self._files[name]
        return fetch(self._snapshot, wanted, tell, self._timing)


def open_model(model: HubModel, timing: HubTiming, cache: Path | None = None) -> HubCheckpoint:
    """Finds the commit that a revision names, and its files. Asks the hub, unless it is a commit that is known.

    If the hub cannot be reached, the commit that the revision named last counts. `cache`: another folder than the
    environment's.

    Raises:
        ConfigError: there is no such model or revision, or no access to it.
        CheckpointError: the hub may not be asked, and the cache does not have it.
        Unavailable: the hub cannot be reached, and the cache does not have it.
    """
    cache = cache or cache_dir()
    last = cached_commit(model, cache)
    if last is not None and (model.commit is not None or is_offline()):
        found = _cached(HubModel(model.repo, last), cache, timing)
        if found is not None and (is_offline() or found.is_listed):
            return found
    if is_offline():
        raise missing(model, "it")
    try:
        client = HubClient(model, timing)
        commit, files = client.patiently(client.list_files)
    except Unavailable as e:
        found = _cached(HubModel(model.repo, last), cache, timing) if last is not None else None
        if found is None:
            text = f"{e.message} (there is no folder {model.repo} here)"
            raise Unavailable(text, retry_after_s=e.retry_after_s) from e
        log.warning("%s; going on with %s of the cache", e.message, found.model)
        return found
    snapshot = Snapshot(HubModel(model.repo, commit), cache)
    keep_commit(model, commit, cache)
    snapshot.keep_files(files)
    return HubCheckpoint(snapshot, files, timing, is_listed=True)


def _cached(model: HubModel, cache: Path, timing: HubTiming) -> HubCheckpoint | None:
    """Returns a commit by what the cache has of it: the list of its files, else files that another program fetched."""
    snapshot = Snapshot(model, cache)
    if listed := snapshot.files():
        return HubCheckpoint(snapshot, listed, timing, is_listed=True)
    paths = (path for path in snapshot.folder.rglob("*") if path.is_file())
    there = {str(path.relative_to(snapshot.folder)): RemoteFile(path.stat().st_size, "") for path in paths}
    return HubCheckpoint(snapshot, there, timing, is_listed=False) if there else None


def present(model: HubModel, layers: tuple[int, int] | None, num_layers: int) -> Path | None:
    """Returns the folder if it has all files of these layers already (None: no weights), else None. Asks nobody.

    Raises CheckpointError if its index cannot be read.
    """
    found = _cached(model, cache_dir(), HubTiming())
    if found is None or not found.is_listed or not found.has(found.description_files()):
        return None
    return found.folder if layers is None or found.has(found.layer_files(layers, num_layers)) else None
