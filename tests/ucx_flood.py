"""A process that sends over UCX without an end, to be stopped or killed in the midst of it.

python ucx_flood.py TAG BYTES PAUSE_S    -> its address, in hex    <- the receiver's address, in hex
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

from stagemesh.transport import Request, open_transport

UNDER_WAY = 4


@dataclass
class Sender:
    """One such process; `address` is its own."""

    process: subprocess.Popen[str]
    address: bytes

    def send_to(self, receiver: bytes) -> None:
        """Starts sending."""
        assert self.process.stdin is not None
        self.process.stdin.write(receiver.hex() + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Kills and reaps it."""
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def start(tag: int, nbytes: int, pause_s: float = 0.0) -> Sender:
    """Starts one that has yet to be told to whom."""
    command = [sys.executable, __file__, str(tag), str(nbytes), str(pause_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return Sender(process, bytes.fromhex(process.stdout.readline()))


def main() -> None:
    """See the top."""
    tag, nbytes, pause_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    transport = open_transport("ucx")
    print(transport.address().hex(), flush=True)
    peer = transport.connect(bytes.fromhex(sys.stdin.readline()))
    under_way: list[Request] = []
    buffer = bytearray(nbytes)
    while peer.error is None:
        if len(under_way) < UNDER_WAY:
            under_way.append(peer.send(tag, buffer))
        transport.progress()
        under_way = [request for request in under_way if not request.done]
        time.sleep(pause_s)


if __name__ == "__main__":
    main()
