"""Chooses the transport of a link between two workers."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest

from .target import CannotForm


def rank_addresses(worker: RegisterRequest, transport: str) -> Sequence[bytes]:
    """One address per rank. Empty if the worker has not opened the transport."""
    return next((t.rank_addresses for t in worker.transports if t.name == transport), ())


def transport(
    wanted: str, sender: RegisterRequest, receiver: RegisterRequest, *, ucx_failed: str = ""
) -> tuple[str, str]:
    """The transport of a link, and a warning if it is not the best one.

    `wanted`: auto, ucx or tcp. `ucx_failed`: why UCX between these two workers failed before, else empty. Raises
    CannotForm when they have no transport in common.
    """

    def lacks(name: str) -> list[str]:
        return [w.worker_id for w in (sender, receiver) if not rank_addresses(w, name)]

    if wanted in ("auto", "ucx") and not lacks("ucx") and not (ucx_failed and wanted == "auto"):
        return "ucx", ""
    if wanted == "ucx":
        raise CannotForm(
            f"--transport ucx, but {' and '.join(lacks('ucx'))} did not open it: install the extra ucx-cu12 or "
            "ucx-cu13 there (its log says what failed), or use --transport auto"
        )
    if lacks("tcp"):
        raise CannotForm(
            f"workers {sender.worker_id} and {receiver.worker_id} have no transport in common: "
            f"{' and '.join(lacks('tcp'))} did not open tcp; start them with --transport auto"
        )
    if wanted == "tcp":
        return "tcp", ""
    why = ucx_failed or f"{' and '.join(lacks('ucx'))} did not open ucx (its log says why)"
    return "tcp", f"link {sender.worker_id} -> {receiver.worker_id} falls back from ucx to tcp, which is slower: {why}"
