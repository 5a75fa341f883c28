"""Fetches files of a commit into the cache, each once on this machine, whoever wants it.

huggingface_hub's own `hf_hub_download` begins a file anew after an interruption, and does not compare its content with
the hub's checksum. Here the first part of a file keeps a name, by its checksum, and a file gets its place in the cache
only if its checksum is right. The lock is huggingface_hub's, so other programs wait for a download, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO

from stagemesh.errors import Cancelled, CheckpointError, ConfigError, Unavailable

from .cache import RemoteFile, Snapshot, writable
from .client import HubClient
from .timing import HubTiming

FILES_AT_ONCE = 8
TRIES = 5
"""Requests in a row that may bring nothing."""
READ_BYTES = 1 << 22
GIB = 2**30
log = logging.getLogger(__name__)

Tell = Callable[[int, int], None]
"""Is told (bytes that are here, bytes in all)."""


def fetch(snapshot: Snapshot, files: Mapping[str, RemoteFile], tell: Tell, timing: HubTiming) -> int:
    """Fetches those of `files` that are not there. Returns the bytes that this call has brought.

    Raises ConfigError (no access, no room), CheckpointError (content that is not the hub's), Unavailable (try again).
    """
    wanted = {name: file for name, file in files.items() if not snapshot.has(name, file)}
    if not wanted:
        return 0
    _check_room(snapshot, wanted)
    return _Fetching(snapshot, wanted, tell, timing).run()


def _check_room(snapshot: Snapshot, wanted: Mapping[str, RemoteFile]) -> None:
    folder = snapshot.repository
    with writable(folder):
        for path in (folder / "blobs", snapshot.folder, snapshot.lock("").parent):
            path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    # Others may fetch some of them now, and each file once if two have the same content.
    blobs = {file.etag or name: file for name, file in wanted.items()}
    needed = sum(
        file.size - _size(snapshot.partial(key)) for key, file in blobs.items() if not snapshot.blob(key).exists()
    )
    if needed > free:
        raise ConfigError(
            f"{len(blobs)} files of {snapshot.model} need {needed / GIB:.2f} GiB in {snapshot.cache}, and "
            f"{free / GIB:.2f} GiB are free: make room, or set HF_HOME to a larger disk"
        )


class _Fetching:
    """One call of `fetch`. Each file has a thread."""

    def __init__(self, snapshot: Snapshot, wanted: Mapping[str, RemoteFile], tell: Tell, timing: HubTiming) -> None:
        self._snapshot, self._wanted, self._tell, self._timing = snapshot, wanted, tell, timing
        self._client = HubClient(snapshot.model, timing)
        self._here = dict.fromkeys(wanted, 0)
        """Name -> bytes of it that are here."""
        self._brought = 0
        self._told_at = 0.0
        self._total = sum(file.size for file in wanted.values())
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self) -> int:
        """Fetches all. When one fails the others stop, and its error is raised."""
        with ThreadPoolExecutor(min(FILES_AT_ONCE, len(self._wanted)), "fetch") as pool:
            jobs = [pool.submit(self._file, name, file) for name, file in self._wanted.items()]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                failed = next((job for job in done if job.exception() is not None), None)
            finally:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        if failed is not None:
            failed.result()
        self._tell(self._total, self._total)
        return self._brought

    def _note(self, name: str, here: int, brought: int = 0) -> None:
        """Notes how much of a file is here. Tells the sum now and then."""
        if self._stop.is_set():
            raise Cancelled("the download was stopped")
        with self._lock:
            self._here[name] = here
            self._brought += brought
            now = time.monotonic()
            if now - self._told_at >= self._timing.told_s:
                self._told_at = now
                self._tell(sum(self._here.values()), self._total)

    def _file(self, name: str, file: RemoteFile) -> None:
        """Fetches one file, or waits until another process has."""
        snapshot = self._snapshot
        key = file.etag or hashlib.sha256(f"{snapshot.model}/{name}".encode()).hexdigest()
        blob, partial = snapshot.blob(key), snapshot.partial(key)
        with self._locked(name, snapshot.lock(key), partial):
            if not file.etag or not blob.exists() or _size(blob) != file.size:
                if not self._whole(name, file, partial) and not self._whole(name, file, partial):
                    partial.unlink(missing_ok=True)
                    raise CheckpointError(
                        f"{snapshot.model}/{name}: its content does not have the checksum that {self._client.endpoint} "
                        f"tells ({file.etag}): a proxy or mirror may have changed it"
                    )
                with writable(blob.parent):
                    partial.replace(blob)
            with writable(snapshot.folder):
                snapshot.place(name, key)
        self._note(name, file.size)

    @contextlib.contextmanager
    def _locked(self, name: str, path: Path, partial: Path) -> Iterator[None]:
        """Holds a file's lock. Meanwhile the progress of whoever holds it counts as ours."""
        from filelock import FileLock, Timeout

        lock = FileLock(path, mode=0o664)
        while not lock.is_locked:
            with writable(path.parent), contextlib.suppress(Timeout):
                lock.acquire(timeout=self._timing.lock_look_s)
            self._note(name, _size(partial))
        try:
            yield
        finally:
            lock.release()

    def _whole(self, name: str, file: RemoteFile, path: Path) -> bool:
        """Makes `path` the whole file. Returns False, with nothing left, if its checksum is another one."""
        with writable(path.parent), path.open("a+b") as out:
            part = _Part(out, file)
            tries, pause_s = 0, self._timing.retry_s
            while (position := part.size) < file.size:
                try:
                    self._continue(name, file, part)
                except Unavailable as e:
                    if part.size > position:
                        tries, pause_s = 0, self._timing.retry_s
                    tries += 1
                    if tries >= TRIES or (e.retry_after_s or 0) > self._timing.patience_s:
                        raise
                    log.warning("%s; trying again", e.message)
                    if self._stop.wait(max(pause_s, e.retry_after_s or 0)):
                        raise Cancelled("the download was stopped") from e
                    pause_s = min(2 * pause_s, self._timing.retry_most_s)
            if part.is_right():
                return True
            part.restart()
        return False

    def _continue(self, name: str, file: RemoteFile, part: _Part) -> None:
        """Reads the file from the end of `part` on. Raises Unavailable if it is cut."""
        with self._client.read(name, part.size) as (start, chunks):
            if start != part.size:  # The server knows no ranges.
                part.restart()
            for chunk in chunks:
                if part.size + len(chunk) > file.size:
                    raise CheckpointError(
                        f"{self._client.model}/{name} is longer than the {file.size} bytes that the hub tells"
                    )
                part.add(chunk)
                self._note(name, part.size, len(chunk))
        if part.size < file.size:
            raise Unavailable(f"{self._client.model}/{name} ended after {part.size} of {file.size} bytes")


class _Part:
    """The first part of a file, and its digest."""

    def __init__(self, out: BinaryIO, file: RemoteFile) -> None:
        """`out` may hold what was fetched before."""
        self._out, self._file = out, file
        self.size = 0
        """Bytes that are there."""
        self._digest = _digest_of(file)
        out.seek(0)
        while data := out.read(READ_BYTES):
            self._digest.update(data)
            self.size += len(data)
        if self.size > file.size:
            self.restart()

    def add(self, chunk: bytes) -> None:
        self._out.write(chunk)
        self._out.flush()  # Others see how far it is, and a kill loses nothing.
        self._digest.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        """Drops what is there."""
        self._out.flush()
        self._out.truncate(0)
        self._digest, self.size = _digest_of(self._file), 0

    def is_right(self) -> bool:
        """Whether the whole file has the hub's checksum. True if the hub tells none."""
        return not self._file.etag or self._digest.hexdigest() == self._file.etag


def _digest_of(file: RemoteFile) -> hashlib._Hash:
    """An empty digest of the kind that the etag is."""
    if len(file.etag) == 40:
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.sha256()


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
