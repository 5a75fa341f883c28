"""Leader election on Kubernetes: the leader holds a Lease (coordination.k8s.io/v1).

The election is that of client-go. A record that has not changed for its duration has expired. Each coordinator measures
that by its own clock, so clocks of machines are not compared. Each write names the version that it replaces, so only
one of two writers succeeds. Every new holder raises the record's count of transitions. That count is the term. Each
term has its own epochs, above those of all earlier terms, so no epoch repeats even if the volume that stored them is
lost. A coordinator gives orders only while no other can hold the Lease (`is_sure`): a process that was stopped for a
while gives none when it continues.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import math
import os
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError, StagemeshError, Unavailable

log = logging.getLogger(__name__)

EPOCHS_OF_A_TERM = 2**24


class Conflict(Exception):
    """Another coordinator wrote the Lease first."""


@dataclass(frozen=True)
class Record:
    """Contents of the Lease."""

    holder: str
    term: int
    version: str
    """Changes with every write."""


class ApiServer:
    """Client of Kubernetes' API server in a pod. It uses the service account, whose token changes while the pod runs.

    Calls have a deadline. Raises ConfigError outside a pod.
    """

    def __init__(self, account: str, call_s: float) -> None:
        """`account`: the folder with token, ca.crt and namespace. `call_s`: time-out of one call."""
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
        """Status and body of the answer. Raises Unavailable when the server cannot be reached."""
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


class Lease:
    """The Lease `name`, which `identity` takes and keeps. `duration_s`: how long it is valid without a renewal."""

    def __init__(self, api: ApiServer, name: str, identity: str, duration_s: float) -> None:
        self.name, self.identity = name, identity
        self.term = 0
        """The term since this coordinator took the Lease. 0: it never did."""
        self._api = api
        self._duration_s = duration_s
        self._pause_s = duration_s / 7.5
        self._give_up_s = duration_s * 2 / 3
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{api.namespace}/leases"
        self._version = ""
        self._acquired = ""
        self._sure_until = 0.0

    @property
    def first_epoch(self) -> int:
        """The lowest epoch of this term."""
        return self.term * EPOCHS_OF_A_TERM + 1

    @property
    def is_sure(self) -> bool:
        """Whether this coordinator holds the Lease and no other can have taken it."""
        return time.monotonic() < self._sure_until

    async def take(self, stop: asyncio.Event) -> bool:
        """Waits until the Lease is free or expired, and takes it. Returns False if `stop` is set before.

        Raises ConfigError if the API server forbids it.
        """
        told = ""
        seen: Record | None = None
        since = time.monotonic()
        while True:
            try:
                record = await self._read()
                if record != seen:
                    seen, since = record, time.monotonic()
                expired = time.monotonic() > since + self._duration_s
                if record is None or record.holder in ("", self.identity) or expired:
                    await self._take_over(record)
                    log.info("leader by Lease %s, term %d, as %s", self.name, self.term, self.identity)
                    return True
                why = f"Lease {self.name} is held by {record.holder}; this coordinator waits until it is free"
            except Conflict:
                why = f"another coordinator wrote Lease {self.name} first"
            except Unavailable as e:
                why = e.message
            if why != told:
                log.info("%s", why)
                told = why
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    await stop.wait()
                    return False

    async def keep(self) -> str:
        """Renews the Lease until it is lost. Returns the reason before another coordinator may take it."""
        why = ""
        while (left := self._sure_until - time.monotonic()) > 0:
            await asyncio.sleep(min(self._pause_s, left))
            try:
                async with asyncio.timeout(max(0.0, self._sure_until - time.monotonic())):
                    await self._write_as(self.identity)
            except Conflict:
                return f"Lease {self.name} has another holder, or was deleted"
            except (StagemeshError, TimeoutError) as e:
                if not why:
                    log.warning("Lease %s is not renewed: %s", self.name, e)
                why = str(e) or why or "the API server does not answer"
            else:
                why = ""
        return f"Lease {self.name} could not be renewed for {self._give_up_s:g} s: {why}"

    async def give_up(self) -> None:
        """Frees the Lease for another coordinator. Best effort: otherwise it expires by itself."""
        try:
            await self._write_as("")
        except (StagemeshError, Conflict) as e:
            log.info("Lease %s expires by itself: %s", self.name, e)

    async def _write_as(self, holder: str) -> None:
        """Writes the Lease. Raises Conflict if another holds it by now, Unavailable if that is not known."""
        try:
            await self._put(self._body(holder, self.term), self._version)
        except Conflict:
            # Perhaps the answer to a write of ours was lost, or that write is still under way.
            record = await self._read()
            if record is None or (record.holder, record.term) != (self.identity, self.term):
                raise
            await self._put(self._body(holder, self.term), record.version)

    async def _take_over(self, record: Record | None) -> None:
        self.term = record.term + 1 if record is not None else 1
        self._acquired = _now()
        await self._put(self._body(self.identity, self.term), record.version if record is not None else "")

    async def _put(self, body: dict[str, Any], version: str) -> None:
        asked = time.monotonic()
        if version:
            body["metadata"]["resourceVersion"] = version
            status, text = await self._api.call("PUT", f"{self._path}/{self.name}", body)
        else:
            status, text = await self._api.call("POST", self._path, body)
        if status == 409 or (version and status == 404):
            raise Conflict
        self._version = self._checked(status, text)["metadata"]["resourceVersion"]
        self._sure_until = asked + self._give_up_s

    async def _read(self) -> Record | None:
        status, text = await self._api.call("GET", f"{self._path}/{self.name}")
        if status == 404:
            return None
        found = self._checked(status, text)
        spec = found.get("spec", {})
        return Record(
            spec.get("holderIdentity") or "",
            spec.get("leaseTransitions") or 0,
            found["metadata"]["resourceVersion"],
        )

    def _checked(self, status: int, text: bytes) -> dict[str, Any]:
        if status in (401, 403, 404):
            raise ConfigError(
                f"--kubernetes-lease {self.name}: the API server answers {status} in namespace {self._api.namespace}: "
                "the pod's service account needs a Role with get, create and update of leases (coordination.k8s.io)"
            )
        if status not in (200, 201):
            raise Unavailable(f"the API server answers {status} for Lease {self.name}: {text[:200]!r}")
        parsed: dict[str, Any] = json.loads(text)
        return parsed

    def _body(self, holder: str, term: int) -> dict[str, Any]:
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.name, "namespace": self._api.namespace},
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": max(1, math.ceil(self._duration_s)),
                "leaseTransitions": term,
                "acquireTime": self._acquired,
                "renewTime": _now(),
            },
        }


def _now() -> str:
    """The current time in the format of Kubernetes' MicroTime."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
