"""The process that a UCX address belongs to.

    address    magic "SMU1", CRC-32 u32, boot id 16 bytes, PID namespace u64, PID u32, start ticks u64, then UCX's own

Little endian without padding. The checksum covers all of it, with zeros in place of the checksum.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from stagemesh.errors import TransportError

_ADDRESS = struct.Struct("<4sI16sQIQ")
_MAGIC = b"SMU1"


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Identifies a process, also across hosts and reboots."""

    boot_id: bytes
    pid_namespace: int
    pid: int
    start_ticks: int

    @classmethod
    def own(cls) -> ProcessIdentity:
        """Returns the identity of this process."""
        boot = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
        pid = os.getpid()
        return cls(boot, os.stat("/proc/self/ns/pid").st_ino, pid, _start_ticks(pid) or 0)

    def watch(self, own: ProcessIdentity) -> int | None:
        """Returns a pidfd of this process, readable when it ends, or None if it is on another host or is `own`.

        Raises:
            TransportError: the process has ended already.
        """
        if (self.boot_id, self.pid_namespace) != (own.boot_id, own.pid_namespace) or self.pid == own.pid:
            return None
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError as error:
            raise TransportError(f"the peer process {self.pid} has ended") from error
        except OSError:
            return None  # A kernel or sandbox without pidfd: only UCX's keep-alive notices its end.
        if _start_ticks(self.pid) != self.start_ticks:
            os.close(pidfd)
            raise TransportError(f"the peer process {self.pid} has ended, another has its number")
        return pidfd

    @property
    def shares_network(self) -> bool:
        """Whether this process, which is on this host, is in the same network namespace."""
        try:
            return os.stat(f"/proc/{self.pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
        except OSError:
            return False


def pack_address(identity: ProcessIdentity, ucx_address: bytes) -> bytes:
    """Packs a UCX worker address with its process and a checksum: UCX does not check an address."""
    own = (identity.boot_id, identity.pid_namespace, identity.pid, identity.start_ticks)
    crc = zlib.crc32(_ADDRESS.pack(_MAGIC, 0, *own) + ucx_address)
    return _ADDRESS.pack(_MAGIC, crc, *own) + ucx_address


def unpack_address(address: bytes) -> tuple[ProcessIdentity, bytes]:
    """Returns the parts of `pack_address`.

    Raises:
        TransportError: the bytes are not a UCX address of this version, or are damaged.
    """
    if len(address) <= _ADDRESS.size or address[:4] != _MAGIC:
        raise TransportError(f"not a UCX address: {len(address)} bytes that begin with {address[:8]!r}")
    _, _, boot_id, namespace, pid, start_ticks = _ADDRESS.unpack_from(address)
    identity, ucx_address = ProcessIdentity(boot_id, namespace, pid, start_ticks), address[_ADDRESS.size :]
    if pack_address(identity, ucx_address) != address:
        raise TransportError("the UCX address is damaged: its checksum does not fit")
    return identity, ucx_address


def _start_ticks(pid: int) -> int | None:
    """Returns when a process began, in ticks since boot, or None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])
