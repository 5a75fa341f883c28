"""A whole mesh of real processes for tests: `stagemesh serve` as a user runs it, on ports that the system gives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0


@dataclass
class Mesh:
    """A running `stagemesh serve`."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    grpc_address: str = ""
    tree: frozenset[int] = frozenset()

    def get(self, path: str) -> Any:
        """GET, parsed as JSON."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120) -> Any:
        """POST of JSON, parsed as JSON. Raises urllib's HTTPError for an error status."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)

    def check_pages_are_free(self, timeout_s: float = 5.0) -> None:
        """Asserts that no request holds a page; a step that was planned ahead of the last answer gets a moment."""
        deadline = time.monotonic() + timeout_s
        while (gateway := self.get("/mesh")["gateway"])["free_pages"] != gateway["total_pages"]:
            assert time.monotonic() < deadline, f"pages are still held: {gateway}"
            time.sleep(0.02)

    def greedy(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> list[int]:
        """Token ids that greedy decoding gives, over the gRPC client library."""
        import asyncio

        return asyncio.run(self._greedy(prompt, max_tokens, **more))

    async def _greedy(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> list[int]:
        from stagemesh import Client

        async with Client(self.grpc_address) as client:
            done = await client.generate(list(prompt), max_tokens=max_tokens, temperature=0, ignore_eos=True, **more)
            return list(done.token_ids)

    @property
    def model(self) -> str:
        """Served model name."""
        return str(self.get("/v1/models")["data"][0]["id"])

    def health(self) -> tuple[int, str]:
        """Status and text of /health."""
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            with e:
                return e.code, e.read().decode()

    @property
    def ready(self) -> bool:
        """Whether /readyz says so."""
        try:
            urllib.request.urlopen(self.url + "/readyz", timeout=5).close()
        except (OSError, urllib.error.HTTPError):
            return False
        return True

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> float:
        """Waits until /readyz is 200; seconds that took. Fails with the log when `serve` ends or the time is up."""
        began = time.monotonic()
        while not self.ready:
            if self.process.poll() is not None or time.monotonic() - began > timeout_s:
                raise AssertionError(f"not ready after {time.monotonic() - began:.1f} s:\n{self.tail()}")
            time.sleep(0.05)
        return time.monotonic() - began

    def wait_standbys(self, count: int, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Waits until so many standbys have a stage's layers loaded."""
        deadline = time.monotonic() + timeout_s
        while self.log.read_text(errors="replace").count(" ready\n") < count:
            assert time.monotonic() < deadline, f"no standby:\n{self.tail()}"
            time.sleep(0.02)

    def epoch(self) -> int:
        """Epoch of the pipeline as the gateway sees it."""
        return int(self.get("/mesh")["pipelines"][0]["epoch"])

    def children(self) -> list[psutil.Process]:
        """All processes below `serve`."""
        return psutil.Process(self.process.pid).children(recursive=True)

    @staticmethod
    def agent_of(rank: psutil.Process) -> psutil.Process | None:
        """The agent of a rank; None where either has just ended."""
        agent = rank.parent()
        return agent if agent is not None and "stagemesh st" in " ".join(agent.cmdline()) else None

    def named(self, title: str) -> list[psutil.Process]:
        """Processes below `serve` whose title contains `title`."""
        found = []
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def tail(self, lines: int = 60) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> float:
        """Ends `serve`; seconds that took. Fails when a process is left."""
        left = self.children() if self.process.poll() is None else []
        began = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"serve did not end within {STOP_TIMEOUT_S} s:\n{self.tail()}") from None
        took_s = time.monotonic() - began
        _, alive = psutil.wait_procs(left, timeout=1.0)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}\n{self.tail()}"
        return took_s


@contextlib.contextmanager
def serve(
    *args: str,
    wait: bool = True,
    env: dict[str, str] | None = None,
    command: Sequence[str] = (sys.executable, "-m", "stagemesh.cli.main"),
    cwd: Path | None = None,
) -> Iterator[Mesh]:
    """`stagemesh serve ARGS` until the block ends; nothing is left behind. `command`: how `stagemesh` is typed."""
    with tempfile.TemporaryDirectory(prefix="stagemesh-test-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "serve", *args, "--port", "0", "--grpc-port", "0"],
                cwd=cwd,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        mesh = Mesh(process, log)
        try:
            if wait:
                find_addresses(mesh)
                mesh.wait_ready()
            yield mesh
        except BaseException:
            print(mesh.tail(120), file=sys.stderr)
            raise
        finally:
            mesh.stop()
        text = log.read_text(errors="replace")
        at = text.find("never retrieved")
        assert at < 0, f"an error that nobody took: {text[max(0, at - 300) : at + 3000]}"


def find_addresses(mesh: Mesh, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Reads the addresses that the gateway says it listens on from the log."""
    began = time.monotonic()
    pattern = re.compile(r"HTTP on (\S+:\d+), gRPC on (\S+:\d+)")
    while (found := pattern.search(mesh.log.read_text(errors="replace"))) is None:
        if mesh.process.poll() is not None or time.monotonic() - began > timeout_s:
            raise AssertionError(f"serve did not start:\n{mesh.tail()}")
        time.sleep(0.05)
    mesh.url, mesh.grpc_address = f"http://{found.group(1)}", found.group(2)
