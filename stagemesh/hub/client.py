"""Requests to a hub, by huggingface_hub: its addresses (HF_ENDPOINT), tokens (HF_TOKEN) and errors.

It is imported where it is used, which takes a tenth of a second.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, TypeVar

import stagemesh
from stagemesh.errors import CheckpointError, ConfigError, Unavailable
from stagemesh.safetensors_header import LENGTH_BYTES, header_length, parse_header

from .cache import RemoteFile, is_offline, missing
from .reference import COMMIT, HubModel
from .substitute import BEGIN_BYTES
from .timing import HubTiming

T = TypeVar("T")

HEADER_BYTES = 100_000
"""What is read of a weight file at first: nearly always its whole header."""
READ = (".json", ".jinja", ".safetensors")
"""Endings of the files that somebody reads."""
ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class HubClient:
    """Asks a hub about one model.

    Every method raises ConfigError and CheckpointError for what stays as it is, and Unavailable for what may pass.
    """

    def __init__(self, model: HubModel, timing: HubTiming) -> None:
        """Raises CheckpointError if the environment forbids to ask the hub."""
        if is_offline():
            raise missing(model, "a file that is needed")
        self.model, self._timing = model, timing
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

        self.endpoint: str = constants.ENDPOINT
        if not self.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"HF_ENDPOINT {self.endpoint!r} is not an address such as https://huggingface.co")
        self._timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            headers = build_hf_headers(library_name="stagemesh", library_version=stagemesh.__version__)
        except OSError as e:
            raise ConfigError(f"cannot read a token ({e}): set HF_TOKEN, or check HF_HOME") from e
        self._has_token = "authorization" in headers
        # Sizes and ranges are those of the files, not of compressed ones.
        self._headers = {**headers, "Accept-Encoding": "identity"}

    def patiently(self, ask: Callable[[], T]) -> T:
        """Calls `ask`, and again if it raises Unavailable, but not for longer than a start may take."""
        pauses = iter((self._timing.retry_s, 2 * self._timing.retry_s))
        while True:
            try:
                return ask()
            except Unavailable as e:
                pause_s = next(pauses, None)
                if pause_s is None or (e.retry_after_s or 0) > self._timing.patience_s:
                    raise
                time.sleep(max(pause_s, e.retry_after_s or 0))

    def list_files(self) -> tuple[str, dict[str, RemoteFile]]:
        """Returns the commit that the revision names now, and its files by name."""
        from huggingface_hub import HfApi

        api = HfApi(library_name="stagemesh", library_version=stagemesh.__version__)
        with self._asking("the list of files"):
            info = api.model_info(
                self.model.repo, revision=self.model.revision, files_metadata=True, timeout=self._timeout_s
            )
            commit = str(info.sha)
            if not COMMIT.fullmatch(commit):
                raise ValueError(f"commit {commit!r}")
            files = {}
            for file in info.siblings or []:
                path = PurePosixPath(file.rfilename)
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"file {file.rfilename!r}")
                etag = (file.lfs.sha256 if file.lfs else file.blob_id) or ""
                if file.size is None:  # A mirror does not tell it.
                    if path.suffix in READ:
                        files[file.rfilename] = self._metadata(file.rfilename, commit)
                    continue
                files[file.rfilename] = RemoteFile(file.size, etag if ETAG.fullmatch(etag) else "")
        return commit, files

    def _metadata(self, name: str, commit: str) -> RemoteFile:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.model.repo, name, revision=commit)
        told = get_hf_file_metadata(url, timeout=self._timeout_s, headers=self._headers)
        etag = told.etag or ""
        if told.size is None:
            raise ValueError(f"no size of {name}")
        return RemoteFile(told.size, etag if ETAG.fullmatch(etag) else "")

    def header(self, name: str, size: int) -> bytes:
        """Reads the raw header of a safetensors file of `size` bytes, and no more than that of it."""
        where = f"{self.model}/{name}"
        begin = self._range(name, 0, min(size, HEADER_BYTES))
        length = header_length(begin[:BEGIN_BYTES], size, where)
        if LENGTH_BYTES + length > len(begin):
            begin += self._range(name, len(begin), LENGTH_BYTES + length - len(begin))
        raw = begin[LENGTH_BYTES : LENGTH_BYTES + length]
        parse_header(raw, size, where)
        return raw

    def _range(self, name: str, first: int, count: int) -> bytes:
        """Reads `count` bytes of a file from `first` on."""
        with self.read(name, first, first + count) as (start, chunks):
            got = bytearray()
            for chunk in chunks:
                got += chunk
                if len(got) >= first - start + count:
                    break
        if len(got) < first - start + count:
            raise Unavailable(
                f"{self.endpoint} sent {len(got)} of {first - start + count} bytes of {self.model}/{name}"
            )
        return bytes(got[first - start : first - start + count])

    @contextlib.contextmanager
    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Opens a file. Gives the byte at which the answer begins, and its chunks.

        The answer begins at `start`, or at 0 if the server knows no ranges.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

        headers = dict(self._headers)
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{end - 1 if end is not None else ''}"
        url = hf_hub_url(self.model.repo, name, revision=self.model.revision)
        with contextlib.ExitStack() as stack:
            with self._asking(name):
                response: Any = stack.enter_context(
                    http_stream_backoff(
                        "GET",
                        url,
                        headers=headers,
                        timeout=self._timeout_s,
                        max_retries=0,
                        retry_on_exceptions=(),
                        retry_on_status_codes=(),
                    )
                )
                hf_raise_for_status(response)
            yield start if response.status_code == 206 else 0, self._chunks(name, response)

    def _chunks(self, name: str, response: Any) -> Iterator[bytes]:
        chunks = response.iter_bytes()  # As they come: with a size they would be held back, and lost by a break.
        while True:
            with self._asking(name):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """A context that converts errors of requests to ours. `what` is asked for."""
        from huggingface_hub import errors

        repo, where = self.model.repo, f"{self.endpoint}/{self.model.repo}"
        token = "the token that is set (HF_TOKEN) has no access" if self._has_token else "no token is set (HF_TOKEN)"
        try:
            yield
        except errors.GatedRepoError as e:
            raise ConfigError(
                f"{repo} is gated: accept its conditions at {where}, and set HF_TOKEN to that account's; {token}"
            ) from e
        except errors.DisabledRepoError as e:
            raise ConfigError(f"{where}: its files may not be downloaded: the hub has disabled it") from e
        except errors.RepositoryNotFoundError as e:
            raise ConfigError(
                f"there is no folder {repo} here, and no model {repo} at {self.endpoint} that you may see: check the "
                f"name; a private one needs HF_TOKEN; {token}"
            ) from e
        except errors.RevisionNotFoundError as e:
            raise ConfigError(
                f"{where} has no revision {self.model.revision!r}: see its branches and tags there"
            ) from e
        except errors.RemoteEntryNotFoundError as e:
            raise CheckpointError(f"{where} has no file {what} at revision {self.model.revision}") from e
        except errors.HfHubHTTPError as e:
            raise self._refused(e, what, token) from e
        except (errors.HTTPError, OSError) as e:  # type: ignore[attr-defined]  # httpx's or httpx2's, by release
            raise Unavailable(
                f"cannot get {what} of {self.model} from {self.endpoint} ({type(e).__name__}: {e}): check network, "
                "proxy and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses the cache alone"
            ) from e
        except (ValueError, TypeError, AttributeError, KeyError) as e:
            raise ConfigError(f"{self.endpoint} does not answer as a hub ({e}): check HF_ENDPOINT") from e

    def _refused(self, error: Any, what: str, token: str) -> ConfigError | Unavailable:
        """Returns the error for an HTTP status that has no class of its own."""
        status, said = error.response.status_code, f"{self.endpoint}: {what} of {self.model}"
        if status in (401, 403):
            return ConfigError(f"{said}: status {status}, access is refused: {token}; check it")
        if status == 429:
            after = error.response.headers.get("Retry-After", "")
            wait_s = float(after) if after.isdigit() else None
            shown = f"in {after} s" if wait_s is not None else "later"
            return Unavailable(
                f"{said}: status 429, too many requests: try again {shown}, or set HF_TOKEN for a higher limit",
                retry_after_s=wait_s,
            )
        if status == 408 or status >= 500:
            return Unavailable(f"{said}: status {status}: the hub has a problem; try again later")
        return ConfigError(f"{said}: status {status}: check the name and HF_ENDPOINT")
