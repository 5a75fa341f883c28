"""A small hub on this machine, which real huggingface_hub talks to: HF_ENDPOINT names it.

Weight files are kept as by Git LFS: the hub redirects to a second address (as to a CDN), which must not get tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIX = ".safetensors"


@dataclass
class Request:
    """A request that came."""

    method: str
    path: str
    range: str
    token: str
    sent: int = 0
    """Bytes of the body that were sent."""

    @property
    def is_file(self) -> bool:
        """Whether it brought bytes of a file, not a redirect."""
        return self.sent > 0 and ("/resolve/" in self.path or "/cdn/" in self.path)


@dataclass
class Hub:
    """A hub with its models. Tests change it while it runs."""

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Id -> commit -> file -> content."""
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    """(id, branch) -> commit."""
    secret: dict[str, str] = field(default_factory=dict)
    """Id of a private model -> the token that may see it."""
    gated: dict[str, str] = field(default_factory=dict)
    """Id of a gated model -> the token that was granted access."""
    status: dict[str, int] = field(default_factory=dict)
    """Part of a path -> status of each answer."""
    break_after: dict[str, list[int]] = field(default_factory=dict)
    """File -> for each of the next requests, the bytes after which the connection breaks."""
    changed: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    """File -> what is sent in place of its content."""
    held: dict[str, threading.Event] = field(default_factory=dict)
    """File -> its second half is sent when this is set."""
    sizes: dict[str, int] = field(default_factory=dict)
    """File -> the size that is told in place of its own."""
    tells_sizes: bool = True
    """Whether a list of files has more than names. Some mirrors' lists do not."""
    ranges: bool = True
    """Whether it knows ranges."""

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Adds a commit with the files of a folder, which the branch names from now on. Returns it."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        digest = hashlib.sha1(repr(sorted((name, hash_of(name, data)) for name, data in files.items())).encode())
        commit = digest.hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.refs[repo, branch] = commit
        return commit

    def fetched(self, name: str, commit: str | None = None) -> int:
        """Bytes that were sent of a file."""
        paths = [f"/{name}"]
        for commits in self.repos.values():
            for sha, files in commits.items():
                if name in files and commit in (None, sha):
                    paths.append(f"/cdn/{hash_of(name, files[name])}")
        return sum(r.sent for r in self.requests if r.is_file and r.path.endswith(tuple(paths)))

    def content(self, name: str) -> bytes:
        """Content of a file of the first commit that has it."""
        return next(files[name] for commits in self.repos.values() for files in commits.values() if name in files)

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """Environment of a process that uses this hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "",
            "HF_HUB_OFFLINE": "",
            "HF_HUB_DOWNLOAD_TIMEOUT": "30",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **more,
        }


def hash_of(name: str, data: bytes) -> str:
    """The etag of a file: of a large one its SHA-256, else its SHA-1 as a git blob."""
    if name.endswith(LFS_SUFFIX):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for event in hub.held.values():
            event.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.request_ = Request(self.command, path, self.headers.get("Range", ""), token)
        self.hub.requests.append(self.request_)
        for part, status in self.hub.status.items():
            if part in path:
                self._send(status, b"{}", {"Retry-After": "77"} if status == 429 else {})
                return
        if path.startswith("/cdn/"):
            self._file(*self._of_digest(path.removeprefix("/cdn/")))
            return
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"] and words[4:5] in (["revision"], []):
            repo, revision, name = "/".join(words[2:4]), "/".join(words[5:]) or "main", None
        elif words[2:3] == ["resolve"]:
            repo, revision, name = "/".join(words[:2]), words[3], "/".join(words[4:])
        else:
            self._refuse(404, "RepoNotFound")
            return
        if repo not in self.hub.repos or token != self.hub.secret.get(repo, token):
            self._refuse(404 if token else 401, "RepoNotFound")
            return
        commit = self.hub.refs.get((repo, revision), revision)
        files = self.hub.repos[repo].get(commit)
        if files is None:
            self._refuse(404, "RevisionNotFound")
        elif name is None:
            self._list(repo, commit, files)
        elif token != self.hub.gated.get(repo, token):
            self._refuse(403 if token else 401, "GatedRepo")
        elif name not in files:
            self._refuse(404, "EntryNotFound")
        else:
            self._resolve(commit, name, files[name])

    def _list(self, repo: str, commit: str, files: dict[str, bytes]) -> None:
        siblings = []
        for name, data in files.items():
            size = self.hub.sizes.get(name, len(data))
            lfs = {"size": size, "sha256": hash_of(name, data), "pointerSize": 134}
            blob = hashlib.sha1(hash_of(name, data).encode()).hexdigest()
            kept = {"lfs": lfs, "blobId": blob} if name.endswith(LFS_SUFFIX) else {"blobId": hash_of(name, data)}
            siblings.append({"rfilename": name, **({"size": size, **kept} if self.hub.tells_sizes else {})})
        self._send(200, json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, commit: str, name: str, data: bytes) -> None:
        etag = hash_of(name, data)
        told = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if not name.endswith(LFS_SUFFIX):
            self._file(name, data, told)
            return
        # Another host name, so another origin.
        told |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {**told, "Location": f"http://localhost:{self.hub.port}/cdn/{etag}"})

    def _of_digest(self, digest: str) -> tuple[str, bytes]:
        for commits in self.hub.repos.values():
            for files in commits.values():
                for name, data in files.items():
                    if hash_of(name, data) == digest:
                        return name, data
        raise KeyError(digest)

    def _file(self, name: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        data = self.hub.changed.get(name, lambda whole: whole)(data)
        told, status, begin = dict(headers or {}), 200, 0
        if self.request_.range and self.hub.ranges:
            first, _, last = self.request_.range.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(int(last) + 1 if last else len(data), len(data)), 206
            told["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data = data[begin:end]
        whole_answer = self.request_.range.endswith("-") or not self.request_.range
        breaks = self.hub.break_after.get(name) if whole_answer and self.command == "GET" else None
        stop_at = breaks.pop(0) if breaks else len(data)
        self.send_response(status)
        for key, value in {**told, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        held = self.hub.held.get(name) if whole_answer else None
        half = len(data) // 2 if held is not None else 0
        with contextlib.suppress(ConnectionError):
            self._write(data[: min(half, stop_at)])
            if held is not None:
                held.wait(60)
            self._write(data[half:stop_at])
        if stop_at < len(data):
            self.close_connection = True
            time.sleep(0)

    def _write(self, data: bytes) -> None:
        for at in range(0, len(data), 1 << 16):
            part = data[at : at + (1 << 16)]
            self.wfile.write(part)
            self.request_.sent += len(part)
        self.wfile.flush()

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "refused"}', {"X-Error-Code": code, "X-Error-Message": "refused"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
