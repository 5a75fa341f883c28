"""Kubernetes' API server as a pod reaches it: by its service account, whose token changes while the pod runs."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import ssl
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError, Unavailable


class ApiServer:
    """Calls with a deadline. Raises ConfigError outside a pod."""

    def __init__(self, account: str, call_s: float) -> None:
        """`account`: the folder with token, ca.crt and namespace. `call_s`: what one call may take."""
        self._call_s = call_s
        self._host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        self._port = int(os.environ.get("KUBERNETES_SERVICE_PORT") or 443)
        self._account = Path(account)
        try:
            self.namespace = (self._account / "namespace").read_text().strip()
            self._tls = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        except OSError as e:
            raise ConfigError(f"--kubernetes-account {account}: {e}: give the folder of a service account") from e
        if not self._host:
            raise ConfigError("--kubernetes-lease works in a pod alone: KUBERNETES_SERVICE_HOST is not set")

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body of the answer. Raises Unavailable."""
        try:
            async with asyncio.timeout(2 * self._call_s):
                return await asyncio.to_thread(self._call, method, path, body)
        except (OSError, http.client.HTTPException) as e:
            where = f"{self._host}:{self._port}"
            raise Unavailable(f"the API server at {where} cannot be reached: {type(e).__name__}: {e}") from e

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {(self._account / 'token').read_text().strip()}"}
        text = None
        if body is not None:
            headers["Content-Type"], text = "application/json", json.dumps(body)
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._call_s, context=self._tls)
        try:
            connection.request(method, path, text, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()
