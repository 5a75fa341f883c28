"""The cache of hub files on this machine: huggingface_hub's own, in its layout, so that other programs share the files.

    models--org--name/refs/REVISION            the commit that a branch or tag named last
    models--org--name/blobs/ETAG               a file
    models--org--name/snapshots/COMMIT/FILE    a link to it

https://huggingface.co/docs/huggingface_hub/guides/manage-cache describes it. What a commit holds never changes, so
its list of files, and the headers of its weights, are kept as well (`assets`): a restart then needs no hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stagemesh.checkpoint import CONFIG
from stagemesh.errors import CheckpointError, ConfigError

from .reference import COMMIT, HubModel

NAMESPACE = "stagemesh"


def is_offline() -> bool:
    """Whether the environment forbids to ask the hub."""
    told = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return told.upper() in ("1", "ON", "YES", "TRUE")


def cache_dir() -> Path:
    """The folder of cached repositories, by huggingface_hub's environment variables."""
    told = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return _expanded(told) if told else _home() / "hub"


def _assets_dir() -> Path:
    told = os.environ.get("HF_ASSETS_CACHE")
    return _expanded(told) if told else _home() / "assets"


def _home() -> Path:
    told = os.environ.get("HF_HOME")
    return _expanded(told) if told else _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit."""

    size: int
    """Bytes."""
    etag: str
    """SHA-256 of its content if it is kept by Git LFS or Xet, else its SHA-1 as a git blob; "" if it is not known."""


@dataclass(frozen=True)
class Snapshot:
    """A model's place in the cache, at one commit."""

    model: HubModel
    """Its revision is a commit."""
    cache: Path

    @property
    def repository(self) -> Path:
        """The folder of all its revisions."""
        return self.cache / f"models--{self.model.repo.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        """The folder with its files, as far as they were fetched. It looks like a checkpoint's folder."""
        return self.repository / "snapshots" / self.model.revision

    def blob(self, etag: str) -> Path:
        """The place of a file's content."""
        return self.repository / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """The place of the first part of a file that is being fetched, or was until it was interrupted."""
        return self.repository / "blobs" / f"{etag}.{NAMESPACE}.incomplete"

    def lock(self, etag: str) -> Path:
        """The lock of whoever fetches the file. It is huggingface_hub's, too."""
        return self.cache / ".locks" / self.repository.name / f"{etag}.lock"

    def has(self, name: str, file: RemoteFile | None = None) -> bool:
        """Whether the file is there, with the size that the hub tells. Its content was checked when it was fetched."""
        with contextlib.suppress(OSError):
            size = (self.folder / name).stat().st_size
            return file is None or size == file.size
        return False

    def place(self, name: str, etag: str) -> None:
        """Makes a file, whose content is in its blob, part of the snapshot."""
        pointer, blob = self.folder / name, self.blob(etag)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        link = pointer.with_name(f".{pointer.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
        try:
            link.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:  # A file system without links.
            shutil.copyfile(blob, link)
        link.replace(pointer)

    # -- what is known of the commit ---------------------------------------------------------------------------------

    def _asset(self, kind: str, name: str) -> Path:
        repo = self.model.repo.replace("/", "--")
        return _assets_dir() / NAMESPACE / repo / self.model.revision / kind / f"{name}.json"

    def files(self) -> dict[str, RemoteFile] | None:
        """Returns the commit's files by name, if they were listed before."""
        path = self._asset("files", "all")
        with contextlib.suppress(OSError, ValueError, TypeError):
            return {name: RemoteFile(**file) for name, file in json.loads(path.read_bytes()).items()}
        return None

    def keep_files(self, files: Mapping[str, RemoteFile]) -> None:
        """Keeps the list of the commit's files."""
        write(self._asset("files", "all"), json.dumps({name: asdict(file) for name, file in files.items()}).encode())

    def header(self, name: str) -> bytes | None:
        """Returns the raw header of a weight file, if it was read before."""
        with contextlib.suppress(OSError):
            return self._asset("headers", name).read_bytes()
        return None

    def keep_header(self, name: str, raw: bytes) -> None:
        """Keeps the raw header of a weight file."""
        write(self._asset("headers", name), raw)


def cached_commit(model: HubModel, cache: Path) -> str | None:
    """Returns the commit that the revision named when the hub was last asked, or None if it never was."""
    if model.commit is not None:
        return model.commit
    repository = Snapshot(model, cache).repository
    with contextlib.suppress(OSError, ValueError):
        commit = (repository / "refs" / model.revision).read_text().strip()
        return commit if COMMIT.fullmatch(commit) else None
    return None


def known_folder(model: HubModel) -> Path | None:
    """Returns the folder of a model if its configuration is in the cache. Asks nobody."""
    commit = cached_commit(model, cache_dir())
    folder = Snapshot(HubModel(model.repo, commit), cache_dir()).folder if commit is not None else None
    return folder if folder is not None and (folder / CONFIG).is_file() else None


def keep_commit(model: HubModel, commit: str, cache: Path) -> None:
    """Keeps the commit that a branch or tag names now."""
    if model.commit is None:
        write(Snapshot(model, cache).repository / "refs" / model.revision, commit.encode())


def write(path: Path, data: bytes) -> None:
    """Writes a whole file at once. Raises ConfigError."""
    with writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """A context that converts a failed write into a ConfigError. The error names the folder."""
    try:
        yield
    except OSError as e:
        raise ConfigError(f"cannot write to {folder}: {e.strerror or e}; free or mount space, or set HF_HOME") from e


def missing(model: HubModel, what: str) -> CheckpointError:
    """Returns the error to raise if the cache lacks something and the hub may not be asked, or does not answer."""
    why = "HF_HUB_OFFLINE is set" if is_offline() else "the hub does not answer"
    return CheckpointError(
        f"{model}: {what} is not in the cache ({cache_dir()}), and {why}: run `stagemesh download {model}` where there "
        "is a network"
    )
