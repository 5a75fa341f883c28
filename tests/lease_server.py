"""What leader election needs of Kubernetes' API server: Leases with versions, over TLS, for whom has the token.

Behaves as kube-apiserver does (404, 409 by resourceVersion, 403); no kube-apiserver is to be had from package indexes.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme

NAMESPACE, TOKEN = "there", "a-token"


@dataclass
class LeaseServer:
    """Its objects, and what goes wrong."""

    port: int
    account: Path
    """Folder of a service account that it knows."""
    leases: dict[str, dict[str, Any]] = field(default_factory=dict)
    writes: int = 0
    wrote_at: float = 0.0
    """The last time (`time.monotonic()`)."""
    away: bool = False
    """Closes connections without an answer."""
    forgets: int = 0
    """So many writes are done and their answers lost."""
    allowed: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """What a pod has of it."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    def holder(self, name: str) -> str:
        """Whom a Lease names."""
        with self.lock:
            return str(self.leases.get(name, {"spec": {"holderIdentity": ""}})["spec"]["holderIdentity"])

    def answer(self, method: str, path: str, token: str | None, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and object."""
        prefix = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
        if token != f"Bearer {TOKEN}":
            return 401, {}
        if not self.allowed or not path.startswith(prefix):
            return 403, {}
        name = path.removeprefix(prefix).removeprefix("/") or body["metadata"]["name"]
        there = self.leases.get(name)
        if method == "GET":
            return (200, there) if there is not None else (404, {})
        if (method == "POST") == (there is not None):
            return (409, {}) if there is not None else (404, {})
        if there is not None and body["metadata"]["resourceVersion"] != there["metadata"]["resourceVersion"]:
            return 409, {}
        self.writes += 1
        self.wrote_at = time.monotonic()
        body["metadata"]["resourceVersion"] = str(self.writes)
        self.leases[name] = body
        return 200 if there is not None else 201, body


@contextlib.contextmanager
def lease_server(folder: Path) -> Iterator[LeaseServer]:
    """Runs one, with the folder of a service account in `folder`."""
    authority = trustme.CA()
    folder.mkdir()
    authority.cert_pem.write_to_path(folder / "ca.crt")
    (folder / "token").write_text(TOKEN)
    (folder / "namespace").write_text(NAMESPACE)

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            with told.lock:
                if told.away:
                    return
                status, found = told.answer(self.command, self.path, self.headers.get("Authorization"), body)
                if self.command != "GET" and told.forgets:
                    told.forgets -= 1
                    return
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    told = LeaseServer(server.server_address[1], folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
